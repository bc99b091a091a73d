"""Merging pairs of CIFAR-10 ResNets: parents, ensemble, averages, and ours by source, fraction apart and seed.

Units of `permutation only` are matched on the source's images, those of `plain average` stand as they come.

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
from torch import nn

import pleas
from benchmarks.common import (
    SOURCES,
    Pair,
    Row,
    load_pair,
    markdown,
    percent,
    plain_average,
    proxies,
    spread,
    write,
)
from datafree.evaluation.evaluate import Evaluation


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
    rows = [*reference_rows(loaded)]
    for source in sources.split(","):
        for seed in numbers(seeds, int):
            rows += merged_rows(loaded, source, seed, numbers(apart, float))
    write(name or pair, rows, table(rows, loaded), "benchmarks.cifar_pair")


def reference_rows(pair: Pair) -> list[Row]:
    """What needs no image: the parents, their ensemble, and the average of their weights as they come."""
    average = plain_average(pair.networks(pair.settings(0)))
    parents = [
        row(f"parent {parent.name}", pair.score_parent(parent), ratio=1.0) for parent in pair.parents.each
    ]
    return [
        *parents,
        row("ensemble", pair.score_ensemble(), ratio=float(len(parents))),
        row("plain average", pair.score(average.module), ratio=average.ratio),
    ]


def merged_rows(pair: Pair, source: str, seed: int, apart: Sequence[float]) -> list[Row]:
    """Averages and our merges from one source and seed, from one pass of statistics."""
    images = proxies(pair, source, seed)
    started = time.perf_counter()
    evidence = pair.gather(pair.settings(seed), images)
    gathering = time.perf_counter() - started
    known: Row = {"source": source, "count": len(images), "seed": seed}
    rows = [
        row(f"{name}, BN re-estimated", pair.score(average), ratio=_ratio(pair, average), **known)
        for name, average in pair.averages(evidence).items()
    ]
    for fraction in apart:
        started = time.perf_counter()
        result = pleas.assemble(evidence, pleas.make_plan(evidence, apart=fraction))
        seconds = {"gather": gathering, "plan_and_solve": time.perf_counter() - started}
        told = {"propagate": result.propagate, "held_out_error": result.held_out_error, "seconds": seconds}
        scored = pair.score(result.module)
        rows.append(row("ours", scored, ratio=result.ratio, apart=fraction, **told, **known))
        print(f"{source}, seed {seed}, {fraction:g} apart: {scored.average:.4f} at {result.ratio:.3f}x")
    return rows


def _ratio(pair: Pair, module: nn.Module) -> float:
    example = pair.parents.example
    return pleas.flops(module, example) / pleas.flops(pair.parents.first.module, example)


def row(method: str, scored: Evaluation, **known: Any) -> Row:
    accuracy = {score.task: score.accuracy for score in scored.tasks}
    return {"method": method, **known, "average": scored.average, "joint": scored.joint, "accuracy": accuracy}


def table(rows: Sequence[Row], pair: Pair) -> str:
    """One line per method, source and fraction; mean and standard deviation over seeds."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for one in rows:
        groups.setdefault((one["method"], one.get("source", ""), one.get("apart")), []).append(one)
    header = ["method", "images", "apart", "multiply-adds", "held-out error", "top-1 (%)"]
    lines = []
    for (method, source, apart), group in groups.items():
        images = f"{group[0]['count']} {source}" if source else ""
        ratio = sum(one["ratio"] for one in group) / len(group)
        line = [method, images, "" if apart is None else f"{apart:g}", f"{ratio:.2f}x"]
        errors = [one["held_out_error"] for one in group if "held_out_error" in one]
        line.append(spread(errors, 3) if errors else "")
        line.append(percent([one["average"] for one in group]))
        if pair.separate:
            joint = [one["joint"] for one in group if one["joint"] is not None]
            line.append(percent(joint) if joint else "")
        lines.append(line)
    return markdown([*header, "joint (%)"] if pair.separate else header, lines)


if __name__ == "__main__":
    main()
