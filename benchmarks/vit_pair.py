"""Merging small vision transformers of different seeds, trained on scikit-learn's digits.

    python -m benchmarks.vit_pair --threads 1

Shared labels: both parents know all ten digits. Disjoint labels: A knows 0-4, B knows 5-9. Every seed trains its own
pair, once; the weights are kept in the cache. Ours is compared with the average of the weights as they come, with the
average of matched weights (permutation only), and with the ensemble, from the digits themselves, from procedural
images and from noise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import click
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional

import pleas
from benchmarks.common import Row, markdown, percent, plain_average, spread, write
from datafree.cache.store import Store, cache_folder, content_hash
from datafree.digits import PREPROCESS, shifted, shuffled, smooth_noise
from datafree.evaluation.evaluate import (
    Columns,
    Evaluation,
    Task,
    TaskSpec,
    evaluate,
    load_task,
    merged_columns,
    parent_columns,
)
from datafree.images.image_set import DigitsSpec, ImageSpec, load_images
from datafree.models.parent import Parent
from datafree.proxy import ProxySpec, build_proxies
from datafree.seeds import derive_seed

Labels = Literal["shared", "separate"]
DIGITS = {"shared": (range(10), range(10)), "separate": (range(5), range(5, 10))}
SOURCES: dict[str, dict[str, Any]] = {
    "real": {"kind": "images", "images": {"digits": {"domain": "upright", "split": "train"}}},
    "procedural": {"kind": "procedural"},
    "noise": {"kind": "noise"},
    "inverted": {"kind": "inversion", "loss": "classes", "steps": 40},
}
VERSION = 1  # raised whenever the code below would train other weights from the same settings


@dataclass(frozen=True)
class Training:
    """Settings of one parent; together with VERSION they decide its weights."""

    digits: tuple[int, ...]
    seed: int
    width: int = 64
    depth: int = 4
    heads: int = 4
    epochs: int = 80
    batch: int = 50
    undecided: int = 12  # images of each kind that is no digit, beside every batch
    smoothing: float = 0.1
    learning_rate: float = 2e-3
    weight_decay: float = 0.1

    def build(self) -> nn.Module:
        return VisionTransformer(
            img_size=8,
            patch_size=2,
            in_chans=1,
            num_classes=len(self.digits),
            embed_dim=self.width,
            depth=self.depth,
            num_heads=self.heads,
        )


@click.command()
@click.option("--labels", default="shared,separate", show_default=True)
@click.option("--sources", default=",".join(SOURCES), show_default=True)
@click.option("--budgets", default="1.0,1.25,1.5,2.0", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--count", default=1000, show_default=True, help="Proxies of every source.")
@click.option("--threads", default=1, show_default=True)
@click.option("--name", default="vit_digits", show_default=True, help="Of the result files.")
def main(
    labels: str,
    sources: str,
    budgets: str,
    seeds: str,
    count: int,
    threads: int,
    name: str,
) -> None:
    """Train or fetch the pairs, merge them, and write benchmarks/results/NAME.json and .md."""
    torch.set_num_threads(threads)
    rows: list[Row] = []
    for heads in labels.split(","):
        for seed in map(int, seeds.split(",")):
            pair = Pair.of(heads, seed)  # type: ignore[arg-type]
            rows += pair.references()
            for source in sources.split(","):
                rows += pair.merged(source, count, [float(budget) for budget in budgets.split(",")])
    write(name, rows, table(rows), "benchmarks.vit_pair")


@dataclass(frozen=True)
class Pair:
    """Two trained parents and what they are judged by."""

    labels: Labels
    seed: int
    a: Parent
    b: Parent
    tasks: tuple[Task, ...]

    @classmethod
    def of(cls, labels: Labels, seed: int) -> Pair:
        parents = []
        for name, digits in zip("ab", DIGITS[labels], strict=True):
            training = Training(tuple(digits), derive_seed(seed, "vit_pair", name) % 2**31)
            parents.append(parent(name, training))
        return cls(labels, seed, parents[0], parents[1], tasks(labels))

    def networks(self) -> pleas.Parents:
        settings = pleas.MergeSettings(heads=self.labels, seed=self.seed)
        return pleas.Parents.of([self.a.module, self.b.module], torch.zeros(2, *PREPROCESS.shape), settings)

    def references(self) -> list[Row]:
        ensemble = pleas.Ensemble(self.a.module, self.b.module, heads=self.labels)
        average = plain_average(self.networks())
        parents = [
            self.row(
                f"parent {p.name.upper()}",
                self.score(p.module, parent_columns(self.labels, p.name, self.outputs)),
                1.0,
            )
            for p in (self.a, self.b)
        ]
        return [
            *parents,
            self.row("ensemble", self.score(ensemble), 2.0),
            self.row("plain average", self.score(average.module), average.ratio),
        ]

    def merged(self, source: str, count: int, budgets: Sequence[float]) -> list[Row]:
        """Permutation only and our merges from one source, from one pass of statistics."""
        spec = ProxySpec.model_validate({"count": count, "sources": [SOURCES[source]]})
        images = build_proxies(spec, [self.a, self.b], self.seed, cache_folder(), Path())
        started = time.perf_counter()
        evidence = pleas.gather(self.networks(), [PREPROCESS(batch) for batch in images.batches(100)])
        rows = []
        for budget in budgets:
            plan = pleas.make_plan(evidence, budget=budget)
            for method, least_squares in (("permutation only", False), ("ours", True)):
                result = pleas.assemble(evidence, plan, least_squares=least_squares)
                scored = self.score(result.module)
                known = {"source": source, "count": len(images), "budget": budget}
                told = {"propagate": result.propagate, "held_out_error": result.held_out_error}
                row = self.row(method, scored, result.ratio, **known, **told)
                rows.append(row | {"seconds": time.perf_counter() - started})
                print(
                    f"{self.labels} {self.seed} {source} {method} {budget}: {scored.average:.4f}", flush=True
                )
        return rows

    @property
    def outputs(self) -> dict[str, int]:
        """Outputs of both parents, by name."""
        return {parent.name: parent.outputs for parent in (self.a, self.b)}

    def score(self, module: nn.Module, columns: Columns | None = None) -> Evaluation:
        if columns is None:
            columns = merged_columns(self.labels, self.outputs)
        return evaluate(module, self.tasks, PREPROCESS, columns)

    def row(self, method: str, scored: Evaluation, ratio: float, **known: Any) -> Row:
        accuracy = {score.task: score.accuracy for score in scored.tasks}
        start = {"labels": self.labels, "seed": self.seed, "method": method, "ratio": ratio}
        return {**start, **known, "average": scored.average, "joint": scored.joint, "accuracy": accuracy}


def tasks(labels: Labels) -> tuple[Task, ...]:
    """The test digits: all for both parents, or each parent's own."""
    test = ImageSpec(digits=DigitsSpec(split="test"))
    if labels == "shared":
        return (load_task(TaskSpec(name="all", images=test), Path()),)
    return tuple(
        load_task(
            TaskSpec(
                name=name,
                expert=expert,
                images=test.model_copy(update={"keep_labels": tuple(digits)}),
                label_offset=digits[0],
            ),
            Path(),
        )
        for name, expert, digits in zip(("low", "high"), "ab", DIGITS["separate"], strict=True)
    )


def parent(name: str, training: Training) -> Parent:
    """The network that the settings give, from the cache or trained and kept there."""
    store = Store(cache_folder())
    key = content_hash({}, json.dumps(asdict(training) | {"version": VERSION}, sort_keys=True))
    kept = store.read("vit_pair", key)
    module = training.build()
    if kept is None:
        started = time.perf_counter()
        fit(module, training)
        store.write("vit_pair", key, module.state_dict())
        print(
            f"trained parent {name}, seed {training.seed}: {time.perf_counter() - started:.0f} s", flush=True
        )
    else:
        module.load_state_dict(dict(kept.tensors))
    reference = "timm.models.vision_transformer.VisionTransformer"
    return Parent(
        name,
        module.eval().requires_grad_(False),
        PREPROCESS,
        len(training.digits),
        None,
        reference,
        {},
        None,
        key,
    )


def fit(model: nn.Module, training: Training) -> None:
    """AdamW, one cosine cycle with warm-up, random shifts, undecided on what is no digit (datafree.digits)."""
    spec = ImageSpec(digits=DigitsSpec(split="train"), keep_labels=training.digits)
    images = load_images(spec, Path())
    assert images.labels is not None
    pixels = PREPROCESS(images.batch(range(len(images))))
    targets = torch.from_numpy(images.labels - training.digits[0])
    steps = len(pixels) // training.batch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model.load_state_dict(training.build().state_dict())
        optimiser = torch.optim.AdamW(
            model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, training.learning_rate, epochs=training.epochs, steps_per_epoch=steps
        )
        for _ in range(training.epochs):
            order = torch.randperm(len(pixels))
            for step in range(steps):
                chosen = order[step * training.batch : (step + 1) * training.batch]
                digits = shifted(pixels[chosen])
                others = [smooth_noise(training.undecided), shuffled(digits[: training.undecided])]
                logits = model(torch.cat([digits, *others]))
                sure = functional.cross_entropy(
                    logits[: len(digits)],
                    targets[chosen],
                    label_smoothing=training.smoothing,
                    reduction="sum",
                )
                unsure = -functional.log_softmax(logits[len(digits) :], 1).mean(1).sum()
                loss = (sure + unsure) / len(logits)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                schedule.step()


def table(rows: Sequence[Row]) -> str:
    """One line per labels, method, source and budget; mean and standard deviation over seeds."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for one in rows:
        key = (one["labels"], one.get("source", ""), one["method"], one.get("budget"))
        groups.setdefault(key, []).append(one)
    lines = []
    for (labels, source, method, budget), group in groups.items():
        images = f"{group[0]['count']} {source}" if source else ""
        ratio = sum(one["ratio"] for one in group) / len(group)
        joint = [one["joint"] for one in group if one["joint"] is not None]
        errors = [one["held_out_error"] for one in group if one.get("held_out_error") is not None]
        lines.append(
            [
                {"shared": "shared", "separate": "disjoint"}[labels],
                method,
                images,
                "" if budget is None else f"{budget:g}",
                f"{ratio:.2f}x",
                spread(errors, 3) if errors else "",
                percent([one["average"] for one in group]),
                percent(joint) if joint else "",
            ]
        )
    header = [
        "labels",
        "method",
        "images",
        "budget",
        "multiply-adds",
        "held-out error",
        "top-1 (%)",
        "joint (%)",
    ]
    return markdown(header, lines)


if __name__ == "__main__":
    main()
