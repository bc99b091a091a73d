"""A whole run's results, made up: every part of the page has something to show."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from datafree.evaluation.evaluate import Evaluation, TaskScore
from datafree.evaluation.fidelity import Fidelity
from datafree.evaluation.measures import bootstrap
from datafree.evaluation.results import Kind, Line, Point, Results, Row
from datafree.evaluation.verdict import verdict
from datafree.report.sheets import Sheet, data_uri
from pleas import LayerEvidence

POINTS = tuple(Point("budget", value) for value in (1.0, 1.25, 2.0))
NAMES = ("upright", "rotated")
LOOKS = {"1 inversion": "fair", "2 noise": "poor"}


def score(task: str, accuracy: float, classes: int = 10, count: int = 400) -> TaskScore:
    generator = np.random.default_rng(0)
    targets = np.arange(count) % classes
    wrong = generator.random(count) > accuracy
    chosen = np.where(wrong, generator.integers(classes, size=count), targets)
    per_class = {f"digit {i}": float((chosen == targets)[targets == i].mean()) for i in range(classes)}
    worst = min(per_class, key=per_class.__getitem__)
    return TaskScore(
        *(task, "a", count, accuracy, per_class, (worst, per_class[worst])),
        agreement={"a": accuracy, "b": 0.5},
        predictions=chosen,
        targets=targets,
        interval=bootstrap({task: (accuracy, count)}),
        top5=0.99 if classes >= 20 else None,
        nll=0.8 - 0.5 * accuracy,
        calibration=0.05,
        normalised=accuracy / 0.98,
        error=1.1 - accuracy,
    )


def evaluation(*accuracies: float, classes: int = 10) -> Evaluation:
    scores = tuple(score(name, value, classes) for name, value in zip(NAMES, accuracies, strict=True))
    interval = bootstrap({one.task: (one.accuracy, one.count) for one in scores})
    return Evaluation(scores, sum(accuracies) / 2, None, interval)


def row(
    kind: Kind, name: str, ratio: float, *accuracies: float, point: Point | None = None, **keys: Any
) -> Row:
    share = sum(accuracies) / 2
    near = Fidelity(64, {"a": share, "b": 0.9 * share}, {"a": 1 - share, "b": 1.1 - share}, 1.1 - share)
    scored = evaluation(*accuracies, classes=keys.pop("classes", 10))
    size = int(272_474 * ratio)
    return Row(kind, name, int(82e6 * ratio), ratio, size, scored, point, fidelity=near, **keys)


def results(classes: int = 10, layers: int = 21) -> Results:
    rows = (
        row("parent", "a", 1.0, 0.98, 0.12, classes=classes),
        row("parent", "b", 1.0, 0.11, 0.97, classes=classes),
        row("ensemble", "", 2.0, 0.96, 0.97, classes=classes),
        row("baseline", "plain average", 1.0, 0.1, 0.12, classes=classes, note="Averages are re-estimated"),
        row("baseline", "permutation only", 1.0, 0.31, 0.28, classes=classes, note="Averages are re-estimated"),
        *(
            row("merged", "", ratio, first, second, point=point, predicted=1.0 - first, classes=classes)
            for ratio, first, second, point in zip(
                (1.0, 1.247, 1.99), (0.62, 0.88, 0.96), (0.66, 0.86, 0.97), POINTS, strict=True
            )
        ),
        row("oracle", "", 1.0, 0.81, 0.8, point=POINTS[0], predicted=0.2, classes=classes),
    )  # fmt: skip
    solved = {
        point: tuple(
            LayerEvidence(f"layers.{i}.conv{i % 3}", (0.02 + 0.01 * (i % 7)) / (number + 1), 100, 10, ())
            for i in range(layers)
        )
        for number, point in enumerate(POINTS)
    }
    plans = {point: _plan(apart) for point, apart in zip(POINTS, (0, 6, 16), strict=True)}
    at = (0.0, 0.25, 0.5, 0.75, 1.0)
    lines = (
        Line(("a", "b"), False, at, (1.4, 2.2, 2.6, 2.1, 1.5)),
        Line(("a", "b"), True, at, (1.4, 1.6, 1.7, 1.6, 1.5)),
    )
    notes = ("parent a: weights of net.<1>", "input units that are constant on the proxies: conv1 (3)")
    found = Results("tiny", "ab" * 32, "shared", NAMES, rows, solved, plans, notes, barriers=lines)
    return Results(**{**vars(found), "verdict": verdict(found, LOOKS, refined=False)})


def _plan(apart: int) -> dict[str, Any]:
    owners = {"a": apart, "b": apart, "a + b": 16 - apart}
    rows = [
        {
            "class": str(number + 1),
            "kind": "channel",
            "units": 16,
            "fused": 16 - apart,
            "apart": apart,
            "owners": {name: count for name, count in owners.items() if count},
            "width": 16 + apart,
            "reason": "" if number else "outputs",
            "couples": [
                f"layers.{number}.conv1[out]",
                f"layers.{number}.bn1.*",
                f"layers.{number}.<conv2>[in]",
            ],
        }
        for number in range(5)
    ]
    tried = [[0.0, 0.75], [0.7, 0.5]]
    return {
        "flops": 1,
        "ratio": 1.0,
        "held_out_error": 0.5,
        "propagate": 0.7,
        "tried": tried,
        "mean_residual": 0.1,
        "classes": rows,
    }


def run_record(layers: int = 21) -> dict[str, Any]:
    looks = [
        {"source": name, "images": 256, "looks": look, "bn_log_var": 0.31, "spread": 0.93, "agreement": 0.4}
        for name, look in LOOKS.items()
    ]
    look = {"loss": 0.5, "agreement": {"shared": 0.7}}
    end = {"loss": 0.3, "agreement": {"shared": 0.8}}
    return {
        "proxies": {
            "count": 512,
            "fingerprint": "cd" * 32,
            "sources": [{"kind": "inversion", "count": 256, "seconds_per_1000": 31.0}],
            "diagnosis": {"sources": looks, "effective_rank": 0.4, "dead_directions": 7},
        },
        "oracle": 512,
        "parents": {
            name: {
                "reference": "python:net.py:net",
                "weights": f"{name}.safetensors",
                "fingerprint": "ef" * 32,
            }
            for name in "ab"
        },
        "seed": 0,
        "device": "cpu",
        "seconds": 62.3,
        "timings": {
            "parents": 1.0,
            "proxies": 33.0,
            "statistics": 3.0,
            "least squares": 12.0,
            "evaluation": 5.5,
        },
        "memory": {
            "parents": 410,
            "proxies": 630,
            "statistics": 702,
            "least squares": 950,
            "evaluation": 950,
        },
        "similarity": [
            {
                "layer": f"layers.{i}.conv{i % 3}",
                "unmatched": 0.02 * (i % 4) - 0.02,
                "matched": 0.4 + 0.02 * (i % 9),
            }
            for i in range(layers)
        ],
        "refine": {
            "budget 1": {
                "start": look,
                "history": [{"seconds": 4.0, "evidence": end}],
                "curve": [{"seconds": 0.0, "average": 0.6}, {"seconds": 4.0, "average": 0.7}],
            }
        },
        "latency": {
            "batch": 8,
            "rounds": 15,
            "networks": {
                "parent a": {"seconds": 0.010, "ratio": 1.0},
                "ensemble": {"seconds": 0.021, "ratio": 2.1},
                "budget 1.25": {"seconds": 0.0134, "ratio": 1.34},
            },
        },
        "versions": {"python": "3.11", "torch": "2.14.1"},
        "machine": {"platform": "Linux", "threads": 1},
        "command": "datafree merge x.yaml -o <out>",
    }


def sheets() -> list[Sheet]:
    pixels = np.random.default_rng(0).integers(256, size=(74, 592, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    return [Sheet(name, 256, 8, data_uri(image), *image.size) for name in LOOKS]
