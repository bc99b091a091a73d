"""Merging pairs of CIFAR-10 ResNets: parents, ensemble, averages, and ours by source, fraction apart and
seed.

python -m benchmarks.cifar_pair --pair cifar_resnet20
python -m benchmarks.cifar_pair --pair cifar_halves --apart 0,0.1,0.25,0.5,1
python -m benchmarks.cifar_pair --set merge.rows=1000 --set merge.positions=12 --name positions_12
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import click
import torch

import pleas
from benchmarks.common import SOURCES, Inputs, Pair, load_pair, markdown, percent, proxies, write
from datafree.evaluate import Evaluation


def numbers(text: str, kind: type) -> list[Any]:
    return [kind(part) for part in text.split(",")]


@click.command()
@click.option(
    "--pair", default="cifar_resnet20", show_default=True, help="A recipe's name: cifar_resnet20, ..."
)
@click.option("--sources", default=",".join(SOURCES), show_default=True)
@click.option(
    "--apart", default="0,0.25,0.5,1", show_default=True, help="Fractions of every class kept apart."
)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change the pair's recipe.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--name", default=None, help="Of the result files; the pair's name if not given.")
def main(
    pair: str,
    sources: str,
    apart: str,
    seeds: str,
    changes: tuple[str, ...],
    device: str,
    threads: int,
    name: str | None,
) -> None:
    """Measure one pair and write benchmarks/results/NAME.json and .md."""
    torch.set_num_threads(threads)
    loaded = load_pair(pair, device, changes)
    symmetry = pleas.trace(loaded.a.module, loaded.example())
    rows = [*reference_rows(loaded, symmetry)]
    for source in sources.split(","):
        for seed in numbers(seeds, int):
            rows += merged_rows(loaded, symmetry, source, seed, numbers(apart, float))
    write(name or pair, rows, table(rows, loaded), "benchmarks.cifar_pair")


def reference_rows(pair: Pair, symmetry: pleas.Symmetry) -> list[dict[str, Any]]:
    """What needs no image: the parents, their ensemble, and the average of their weights as they come."""
    a, b = pair.a.module, pair.b.module
    heads = pair.recipe.recipe.labels
    return [
        row("parent A", pair.score_parent(pair.a), ratio=1.0),
        row("parent B", pair.score_parent(pair.b), ratio=1.0),
        row("ensemble", pair.score(pleas.Ensemble(a, b, heads)), ratio=2.0),
        row("plain average", pair.score_average(pleas.plain_average(symmetry, a, b)), ratio=1.0),
    ]


def merged_rows(
    pair: Pair, symmetry: pleas.Symmetry, source: str, seed: int, apart: Sequence[float]
) -> list[dict[str, Any]]:
    """Permutation only and our merges from one source and seed, from one pass of statistics."""
    a, b, settings = pair.a.module, pair.b.module, pair.settings(seed)
    images = proxies(pair, source, seed)
    inputs = Inputs(images, pair)
    started = time.perf_counter()
    statistics = pleas.collect(symmetry, a, b, inputs, settings)
    matching = pleas.match(symmetry, statistics, a, b, settings)
    collecting = time.perf_counter() - started
    known: dict[str, Any] = {"source": source, "count": len(images), "seed": seed}
    permuted = pleas.permutation_only(symmetry, matching, a, b)
    repaired = pleas.reestimate_bn(permuted, inputs)
    plain = pleas.reestimate_bn(pleas.plain_average(symmetry, a, b), inputs)
    rows = [
        row("plain average, BN re-estimated", pair.score_average(plain), ratio=1.0, **known),
        row("permutation only", pair.score_average(permuted), ratio=1.0, **known),
        row("permutation only, BN re-estimated", pair.score_average(repaired), ratio=1.0, **known),
    ]
    costs = pleas.fusing_costs(symmetry, statistics, matching, a, b)
    for fraction in apart:
        started = time.perf_counter()
        plan = pleas.make_plan(symmetry, statistics, matching, a, b, settings, apart=fraction, costs=costs)
        result = pleas.assemble(symmetry, statistics, matching, plan, a, b, settings, example=pair.example())
        seconds = {"collect_and_match": collecting, "plan_and_solve": time.perf_counter() - started}
        scored = pair.score(result.module)
        rows.append(row("ours", scored, ratio=result.ratio, apart=fraction, seconds=seconds, **known))
        print(f"{source}, seed {seed}, {fraction:g} apart: {scored.average:.4f} at {result.ratio:.3f}x")
    return rows


def row(method: str, scored: Evaluation, **known: Any) -> dict[str, Any]:
    accuracy = {score.task: score.accuracy for score in scored.tasks}
    return {"method": method, **known, "average": scored.average, "joint": scored.joint, "accuracy": accuracy}


def table(rows: Sequence[dict[str, Any]], pair: Pair) -> str:
    """One line per method, source and fraction; mean and standard deviation over seeds."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in rows:
        groups.setdefault((one["method"], one.get("source", ""), one.get("apart")), []).append(one)
    header = ["method", "images", "apart", "multiply-adds", "top-1 (%)"]
    lines = []
    for (method, source, apart), group in groups.items():
        images = f"{group[0]['count']} {source}" if source else ""
        ratio = sum(one["ratio"] for one in group) / len(group)
        line = [method, images, "" if apart is None else f"{apart:g}", f"{ratio:.2f}x"]
        line.append(percent([one["average"] for one in group]))
        if pair.separate:
            joint = [one["joint"] for one in group if one["joint"] is not None]
            line.append(percent(joint) if joint else "")
        lines.append(line)
    return markdown([*header, "joint (%)"] if pair.separate else header, lines)


if __name__ == "__main__":
    main()
