"""What tracing a model costs: seconds, and memory relative to the model.

    python -m benchmarks.trace_cost

Every model is traced in processes of their own, since a process's peak never falls: once as the first thing the
process does, once after a tiny network was traced there. What tracing adds is the peak less the resident memory just
before (Python, torch and the model itself), relative to the bytes of the model's parameters and buffers. The first
trace of a process also loads those parts of torch that export needs: a later one does not. Where the load of the
machine (processes that want a core, this one included) exceeds its cores, the CPU seconds are the fairer time.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

import pleas
from benchmarks.common import PROJECT, markdown, write
from datafree.models.parent import build_model

MEBIBYTE = 1 << 20
LIMITS = {"torchvision:resnet50": 10.0, "torchvision:vit_b_16": 20.0}  # seconds, on two cores
MEMORY_LIMIT = 3.0  # of the model's bytes


@click.command()
@click.option("--models", default=",".join(LIMITS), show_default=True)
@click.option("--size", default=224, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--name", default="trace_cost", show_default=True, help="Of the result files.")
@click.option("--one", default=None, hidden=True, help="Measure one model and print it as JSON.")
@click.option("--warm", is_flag=True, hidden=True, help="Trace a tiny network before.")
def main(models: str, size: int, threads: int, name: str, one: str | None, warm: bool) -> None:
    """Measure every model and write benchmarks/results/NAME.json and .md."""
    if one is not None:
        print(json.dumps(measure(one, size, threads, warm)))
        return
    cases = [(model, warm) for model in models.split(",") for warm in (False, True)]
    rows = [measure_in_child(model, size, threads, warm) for model, warm in cases]
    header = [
        "model",
        "trace",
        "model (MiB)",
        "seconds",
        "CPU seconds",
        "load",
        "limit (s)",
        "before (MiB)",
        "peak (MiB)",
        "added (MiB)",
        "added / model",
        "limit",
    ]
    write(name, rows, markdown(header, [_cells(row) for row in rows]), "benchmarks.trace_cost")


def _cells(row: dict[str, Any]) -> list[str]:
    limit = LIMITS.get(row["model"])
    return [
        row["model"],
        "a later one" if row["warm"] else "first of the process",
        f"{row['bytes'] / MEBIBYTE:.0f}",
        f"{row['seconds']:.1f}",
        f"{row['cpu']:.1f}",
        f"{row['load']:.1f}",
        "-" if limit is None else f"{limit:.0f}",
        f"{row['before'] / MEBIBYTE:.0f}",
        f"{row['peak'] / MEBIBYTE:.0f}",
        f"{(row['peak'] - row['before']) / MEBIBYTE:.0f}",
        f"{(row['peak'] - row['before']) / row['bytes']:.2f}",
        f"{MEMORY_LIMIT:.0f}",
    ]


def measure_in_child(model: str, size: int, threads: int, warm: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.trace_cost", "--one", model]
    command += ["--size", str(size), "--threads", str(threads), *["--warm"] * warm]
    done = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    added = (row["peak"] - row["before"]) / row["bytes"]
    print(f"{model}: {row['seconds']:.1f} s, {added:.2f} times the model")
    return row


def measure(model: str, size: int, threads: int, warm: bool) -> dict[str, Any]:
    """Seconds of one trace; bytes of the model, and of the process before tracing and at its peak."""
    torch.set_num_threads(threads)
    if warm:
        pleas.trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()), torch.zeros(2, 3, 4, 4))
    torch.manual_seed(0)
    module = build_model(model, {}, Path(PROJECT)).eval()
    example = torch.zeros(2, 3, size, size)
    before = resident()
    started, worked = time.perf_counter(), time.process_time()
    symmetry = pleas.trace(module, example)
    seconds, cpu = time.perf_counter() - started, time.process_time() - worked
    return {
        "model": model,
        "bytes": weight(module),
        "seconds": seconds,
        "cpu": cpu,
        "load": os.getloadavg()[0],
        "before": before,
        "peak": peak(),
        "gate_error": symmetry.gate_error,
        "threads": threads,
        "warm": warm,
    }


def weight(module: nn.Module) -> int:
    """Bytes of the parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kibibytes


if __name__ == "__main__":
    main()
