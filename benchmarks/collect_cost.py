"""What collecting statistics costs: time relative to the two forward passes alone, and memory by number of
proxies.

    python -m benchmarks.collect_cost --model timm:resnet18 --size 224 --batch 16 --counts 64,128

Time: both are measured in one process, one after the other, best of --repeats. Memory: every count runs in a
process of its own, since a process's peak never falls; the images are made batch by batch and are not kept.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import pleas
from benchmarks.common import PROJECT, markdown, write
from datafree.models import build_model

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
    lines = [
        [
            str(row["count"]),
            f"{row['forward']:.2f}",
            f"{row['collect']:.2f}",
            f"{row['collect'] / row['forward']:.2f}",
            f"{row['before']:.0f}",
            f"{row['peak']:.0f}",
        ]
        for row in rows
    ]
    header = ["images", "two forwards (s)", "collect (s)", "ratio", "memory before (MiB)", "peak (MiB)"]
    write(name, rows, markdown(header, lines), "benchmarks.collect_cost")


def measure_in_child(count: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.collect_cost", *sys.argv[1:], "--one", str(count)]
    done = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{count} images: collecting costs {row['collect'] / row['forward']:.2f} of two forwards, "
        f"{row['peak']:.0f} MiB"
    )
    return row


def measure(
    count: int,
    model: str,
    channels: int,
    size: int,
    batch: int,
    rows: int,
    repeats: int,
    threads: int,
    device: str,
) -> dict[str, Any]:
    """Seconds of both forwards and of collecting on the same images; memory before and at its peak (MiB)."""
    torch.set_num_threads(threads)
    parents = [random_parent(model, seed).to(device) for seed in (0, 1)]
    shape = (channels, size, size)
    inputs = Noise(count, batch, shape, device)
    symmetry = pleas.trace(parents[0], torch.zeros(2, *shape))
    settings = pleas.MergeSettings(rows=rows)

    def forwards() -> None:
        with torch.no_grad():
            for images in inputs:
                for parent in parents:
                    parent(images)

    def collecting() -> None:
        pleas.collect(symmetry, parents[0], parents[1], inputs, settings)

    forward = best(forwards, repeats, device)
    before = peak()
    return {
        "count": count,
        "forward": forward,
        "collect": best(collecting, repeats, device),
        "before": before,
        "peak": peak(),
    }


def random_parent(reference: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(reference, {}, Path(PROJECT))


def best(work: Callable[[], None], repeats: int, device: str) -> float:
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
