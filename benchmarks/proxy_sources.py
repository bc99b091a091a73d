"""Which source of proxies merges how well, and which score of `datafree diagnose` says so beforehand.

python -m benchmarks.proxy_sources --pair cifar_resnet20 --sources real,inversion,thumbnails --counts 64,256,1024
python -m benchmarks.proxy_sources --pair quickstart --apart 0,0.25,0.5
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import click
import torch
from scipy.stats import spearmanr

import pleas
from benchmarks.common import CIFAR, THUMBNAILS, Inputs, Pair, load_pair, markdown, percent, write
from datafree.diagnose import SourceDiagnosis, diagnose
from datafree.proxy import ProxySet, ProxySpec, build_proxies
from datafree.store import cache_folder

CIFAR_100 = "${DATAFREE_DATA}/data/cifar100.npz"
GENERATORS = ("fractals", "leaves", "network", "fbm", "warp", "spectrum")


def only(generator: str) -> dict[str, Any]:
    return {"kind": "procedural", "mix": {name: float(name == generator) for name in GENERATORS}}


ANYWHERE: dict[str, list[dict[str, Any]]] = {
    "inversion": [{"kind": "inversion"}],
    "inversion, joint": [{"kind": "inversion", "mode": "joint"}],
    "inversion, 60 steps": [{"kind": "inversion", "steps": 60}],
    "inversion from noise": [{"kind": "inversion", "start": "noise"}],
    "procedural": [{"kind": "procedural"}],
    **{generator: [only(generator)] for generator in GENERATORS},
    "gaussian noise": [{"kind": "noise"}],
    "uniform noise": [{"kind": "noise", "form": "uniform"}],
    "inversion + procedural": [
        {"kind": "inversion", "share": 0.5},
        {"kind": "procedural", "share": 0.5},
    ],
}
NATURAL: dict[str, list[dict[str, Any]]] = {
    "real": [{"kind": "images", "images": {"npz": CIFAR, "x": "x_train"}}],
    "thumbnails": [{"kind": "images", "images": {"npz": THUMBNAILS, "x": "x"}}],
    "cifar100": [{"kind": "images", "images": {"npz": CIFAR_100, "x": "x_train"}}],
}
DIGITS: dict[str, list[dict[str, Any]]] = {
    "real": [
        {"kind": "images", "share": 0.5, "images": {"digits": {"domain": domain, "split": "train"}}}
        for domain in ("upright", "rotated")
    ]
}


@click.command()
@click.option("--pair", default="cifar_resnet20", show_default=True, help="A recipe's name.")
@click.option("--sources", default=None, help="Names, divided by ';'; all that suit the pair if not given.")
@click.option("--counts", default="256", show_default=True, help="Numbers of images.")
@click.option("--apart", default="0,0.25", show_default=True, help="Fractions of every class kept apart.")
@click.option("--seeds", default="0", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--name", default=None, help="Of the result files.")
def main(
    pair: str,
    sources: str | None,
    counts: str,
    apart: str,
    seeds: str,
    device: str,
    threads: int,
    name: str | None,
) -> None:
    """Merge one pair from every source and write benchmarks/results/NAME.json and .md."""
    torch.set_num_threads(threads)
    loaded = load_pair(pair, device)
    known = ANYWHERE | (DIGITS if loaded.a.preprocess.channels == 1 else NATURAL)
    chosen = sources.split(";") if sources else list(known)
    fractions = [float(part) for part in apart.split(",")]
    symmetry = pleas.trace(loaded.a.module, loaded.example())
    rows: list[dict[str, Any]] = []
    for source in chosen:
        for seed in map(int, seeds.split(",")):
            numbers = sorted(map(int, counts.split(",")))
            spec = ProxySpec.model_validate({"count": numbers[-1], "sources": known[source]})
            whole = build_proxies(
                spec, [loaded.a, loaded.b], seed, cache_folder(), loaded.recipe.base, device=device
            )
            for number in numbers:
                rows += measure(loaded, symmetry, whole.prefix(number), source, seed, fractions)
    shown = f"{accuracies(rows, fractions)}\n\n{rankings(rows, fractions)}"
    write(name or f"proxy_sources_{pair}", rows, shown, "benchmarks.proxy_sources")


def measure(
    pair: Pair,
    symmetry: pleas.Symmetry,
    proxies: ProxySet,
    source: str,
    seed: int,
    fractions: Sequence[float],
) -> list[dict[str, Any]]:
    """The merges from one set of proxies, with what the diagnosis said of it."""
    settings = pair.settings(seed)
    a, b = pair.a.module, pair.b.module
    scores = diagnose(proxies, (pair.a, pair.b), symmetry, settings, device=pair.device)[-1]
    inputs = Inputs(proxies, pair)
    started = time.perf_counter()
    collected = pleas.collect(symmetry, a, b, inputs, settings, images=len(proxies))
    matching = pleas.match(symmetry, collected, a, b, settings)
    seconds = time.perf_counter() - started
    made = [report.seconds_per_1000 * report.count / len(proxies) for report in proxies.manifest]
    rows = []
    for fraction in fractions:
        plan = pleas.make_plan(symmetry, collected, matching, a, b, settings, apart=fraction)
        result = pleas.assemble(symmetry, collected, matching, plan, a, b, settings, example=pair.example())
        scored = pair.score(result.module)
        rows.append(
            {
                "source": source,
                "count": len(proxies),
                "seed": seed,
                "apart": fraction,
                "ratio": result.ratio,
                "average": scored.average,
                "accuracy": {score.task: score.accuracy for score in scored.tasks},
                "residual": result.mean_residual,
                "scores": scores_of(scores),
                "seconds_per_1000": sum(made),
                "seconds_statistics": seconds,
            }
        )
        print(f"{source}, {len(proxies)}, seed {seed}, {fraction:g} apart: {scored.average:.4f}", flush=True)
    return rows


def scores_of(found: SourceDiagnosis) -> dict[str, float | None]:
    """What is known without any real image."""
    return {
        "spread of predictions": found.spread,
        "BN log-variance distance": found.bn_log_var,
        "BN mean distance": found.bn_mean,
        "effective rank": statistics.mean(parent.effective_rank for parent in found.parents),
        "dead directions": float(sum(parent.dead for parent in found.parents)),
        "match stability": found.stability,
        "agreement": found.agreement,
    }


def accuracies(rows: Sequence[dict[str, Any]], fractions: Sequence[float]) -> str:
    """One line per source and number of images, accuracy in per cent per fraction apart."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["source"], row["count"]), []).append(row)
    scores = list(rows[0]["scores"])
    lines = []
    for (source, count), group in groups.items():
        line = [source, str(count)]
        for fraction in fractions:
            line.append(percent([row["average"] for row in group if row["apart"] == fraction]))
        for score in scores:
            values = [row["scores"][score] for row in group]
            line.append("" if None in values else f"{statistics.mean(values):.3g}")
        line.append(f"{statistics.mean(row['seconds_per_1000'] for row in group):.1f}")
        lines.append(line)
    header = ["source", "images", *(f"{fraction:g} apart" for fraction in fractions), *scores, "s per 1,000"]
    return markdown(header, lines)


def rankings(rows: Sequence[dict[str, Any]], fractions: Sequence[float]) -> str:
    """Spearman's correlation of every score with accuracy, over all sources, numbers and seeds."""
    lines = []
    for score in rows[0]["scores"]:
        line = [score]
        for fraction in fractions:
            pairs = [
                (row["scores"][score], row["average"])
                for row in rows
                if row["apart"] == fraction and row["scores"][score] is not None
            ]
            scores, results = ([pair[side] for pair in pairs] for side in (0, 1))
            found: Any = spearmanr(scores, results) if len(pairs) > 2 else None
            line.append("" if found is None else f"{found.statistic:+.2f}")
        lines.append(line)
    return markdown(["Spearman with accuracy", *(f"{fraction:g} apart" for fraction in fractions)], lines)


if __name__ == "__main__":
    main()
