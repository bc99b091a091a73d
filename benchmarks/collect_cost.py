"""What a merge costs beside running its parents: the pass that collects units' moments, and one walk at 1.0x.

    python -m benchmarks.collect_cost --model timm:resnet18 --size 224 --batch 16 --counts 64,128

A walk solves every layer (`pleas.assemble` with a plan of 1.0x): with `propagate` 0, with 1, and with `auto`, which
solves for several values side by side. Times are measured in one process, one after the other, best of --repeats, and
given relative to one pass of all parents over the same images. Memory: every count runs in a process of its own, since
a process's peak never falls; the images are made batch by batch. Collecting keeps none of them, a walk keeps what all
of them give at one place of the network.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import click
import torch
from torch import Tensor, nn

import pleas
from benchmarks.common import PROJECT, Row, markdown, write
from datafree.models.parent import build_model

PROPAGATE: tuple[float | Literal["auto"], ...] = (0, 1, "auto")
MEBIBYTE = 1024.0  # ru_maxrss counts kibibytes on Linux


@dataclass(frozen=True)
class Noise:
    """Normal images, the same on every pass, made batch by batch."""

    count: int
    batch: int
    shape: tuple[int, int, int]
    device: str

    def __len__(self) -> int:
        return -(-self.count // self.batch)

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for start in range(0, self.count, self.batch):
            rows = min(self.batch, self.count - start)
            yield torch.randn(rows, *self.shape, generator=generator).to(self.device)


@click.command()
@click.option("--model", default="python:benchmarks/cifar_resnet.py:resnet20", show_default=True)
@click.option("--channels", default=3, show_default=True)
@click.option("--size", default=32, show_default=True)
@click.option("--batch", default=64, show_default=True)
@click.option("--counts", default="256,512,1024", show_default=True, help="Numbers of images.")
@click.option(
    "--rows", default=16, show_default=True, help="Per unknown of a layer; as in pleas.MergeSettings."
)
@click.option("--parents", default=2, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--name", default="collect_cost", show_default=True, help="Of the result files.")
@click.option("--one", default=None, type=int, hidden=True, help="Measure one count and print it as JSON.")
def main(counts: str, name: str, one: int | None, **options: Any) -> None:
    """Measure every count and write benchmarks/results/NAME.json and .md."""
    if one is not None:
        print(json.dumps(measure(one, **options)))
        return
    rows = [measure_in_child(int(count)) for count in counts.split(",")]
    write(name, rows, table(rows), "benchmarks.collect_cost")


def table(rows: Sequence[Row]) -> str:
    """One line per number of images: seconds of the parents, and everything else relative to them."""
    lines = []
    for row in rows:
        parents, collect = row["seconds"]["parents"], row["seconds"]["collect"]
        walks = [row["seconds"][f"propagate {value}"] for value in PROPAGATE]
        ratios = [collect, *walks, *(collect + walk for walk in walks)]
        memory = [row["memory"][place] for place in ("before", "collect", "walk")]
        line = [str(row["count"]), f"{parents:.2f}", *(f"{seconds / parents:.2f}" for seconds in ratios)]
        lines.append([*line, *(f"{mebibytes:.0f}" for mebibytes in memory)])
    header = ["images", "parents alone (s)", "collect"]
    header += [f"walk, propagate {value}" for value in PROPAGATE]
    header += [f"collect + walk, {value}" for value in PROPAGATE]
    return markdown([*header, "memory before (MiB)", "peak, collect (MiB)", "peak, walks (MiB)"], lines)


def measure_in_child(count: int) -> Row:
    command = [sys.executable, "-m", "benchmarks.collect_cost", *sys.argv[1:], "--one", str(count)]
    done = subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.PIPE, text=True)
    row: Row = json.loads(done.stdout.splitlines()[-1])
    seconds = row["seconds"]
    shown = ", ".join(f"{what} {took / seconds['parents']:.2f}" for what, took in seconds.items())
    print(f"{count} images, relative to the parents alone: {shown}", flush=True)
    return row


def measure(
    count: int,
    model: str,
    channels: int,
    size: int,
    batch: int,
    rows: int,
    parents: int,
    repeats: int,
    threads: int,
    device: str,
) -> Row:
    """Seconds of the parents alone, of collecting and of every walk, on the same images; memory (MiB) before
    collecting, and at its peak after it and after the walks.
    """
    torch.set_num_threads(threads)
    modules = [random_parent(model, seed).to(device) for seed in range(parents)]
    shape = (channels, size, size)
    inputs = Noise(count, batch, shape, device)
    settings = pleas.MergeSettings(rows=rows)
    networks = pleas.Parents.of(modules, torch.zeros(2, *shape), settings)

    def forwards() -> None:
        with torch.no_grad():
            for images in inputs:
                for module in networks.modules:
                    module(images)

    def collecting() -> pleas.Statistics:
        return pleas.collect(networks, inputs, images=count)

    seconds, memory = {"parents": best(forwards, repeats, device)}, {"before": peak()}
    seconds["collect"] = best(collecting, repeats, device)
    memory["collect"] = peak()
    evidence = pleas.gather(networks, inputs, statistics=collecting())
    plan = pleas.make_plan(evidence, budget=1.0)
    for value in PROPAGATE:
        chosen = replace(networks, settings=replace(settings, propagate=value))
        one = replace(evidence, parents=chosen)
        seconds[f"propagate {value}"] = best(lambda one=one: pleas.assemble(one, plan), repeats, device)
    memory["walk"] = peak()
    return {"count": count, "parents": parents, "seconds": seconds, "memory": memory}


def random_parent(reference: str, seed: int) -> nn.Module:
    """The model with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    return build_model(reference, {}, Path(PROJECT)).eval()


def best(work: Callable[[], object], repeats: int, device: str) -> float:
    """Seconds of the fastest of `repeats` calls."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MEBIBYTE


if __name__ == "__main__":
    main()
