"""Tracing every architecture of the zoo (tests/pleas/symmetry/zoo.py): verified, or refused and why.

    python -m benchmarks.zoo --threads 1
    python -m benchmarks.zoo --only "*swin*" --lines /tmp/swin.jsonl

Every model is built with random weights, traced, and checked: one random permutation of all its units, in float64,
must leave its output unchanged. Each outcome is appended to --lines at once; what is in there already is not measured
again, so that an interrupted sweep goes on where it stopped. Every model runs in a process of its own: one that dies
is recorded, too.
"""

from __future__ import annotations

import fnmatch
import json
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from benchmarks.common import PROJECT, markdown, write
from pleas.errors import PleasError
from pleas.symmetry import trace
from tests.pleas.symmetry.zoo import TIMM, TORCHVISION, ZOO

LINES = PROJECT / "runs" / "zoo.jsonl"
QUICK = [key for key, entry in ZOO.items() if entry.quick]
LARGE = [
    "timm:nasnetalarge",
    "wide_resnet101_2",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "efficientnet_b7",
    "efficientnet_v2_l",
    "vgg13",
    "vgg16",
    "vgg19",
    "vgg13_bn",
    "vgg16_bn",
    "vgg19_bn",
    "swin_v2_b",
    "regnet_x_32gf",
    "regnet_y_32gf",
    "convnext_large",
    "vit_l_32",
    "vit_l_16",
    "vit_h_14",
    "regnet_y_128gf",
]  # traced last


@click.command()
@click.option("--only", default="*", show_default=True, help="Names to trace, as a shell pattern.")
@click.option("--lines", default=LINES, show_default=True, type=click.Path(path_type=Path))
@click.option("--threads", default=2, show_default=True)
@click.option("--name", default="zoo", show_default=True, help="Of the result files.")
def main(only: str, lines: Path, threads: int, name: str) -> None:
    """Trace the zoo and write benchmarks/results/NAME.json and .md."""
    torch.set_num_threads(threads)
    wanted = [key for key in [*QUICK, *ZOO] if fnmatch.fnmatch(key, only) and key not in LARGE]
    wanted += [key for key in LARGE if fnmatch.fnmatch(key, only)]
    wanted = list(dict.fromkeys(wanted))
    known = read(lines)
    lines.parent.mkdir(parents=True, exist_ok=True)
    for key in wanted:
        if key not in known:
            known[key] = measure(key)
            with lines.open("a") as file:
                file.write(json.dumps(known[key]) + "\n")
            print(line(known[key]), flush=True)
    rows = [known[key] for key in ZOO if key in wanted]
    write(name, rows, report(rows), "benchmarks.zoo")


def read(lines: Path) -> dict[str, dict[str, Any]]:
    """Outcomes by model; the last one counts."""
    if not lines.exists():
        return {}
    rows = [json.loads(text) for text in lines.read_text().splitlines()]
    return {row["model"]: row for row in rows}


def measure(key: str) -> dict[str, Any]:
    """One model in a process of its own, forked after the imports."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=measure_here, args=(key, theirs))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        child.join()  # it has ended: say how
        return {"model": key, "refused": f"the process ended with code {child.exitcode}", "crashed": True}
    finally:
        child.join()


def measure_here(key: str, outcome: Connection) -> None:
    """Send whether all units of a model may be permuted, and what finding out took."""
    model, example = ZOO[key].build(), ZOO[key].example()
    row: dict[str, Any] = {"model": key, "parameters": parameters(model), "pixels": ZOO[key].pixels}
    started = time.perf_counter()
    try:
        symmetry = trace(model, example)
    except PleasError as error:
        outcome.send(row | {"refused": str(error), "seconds": time.perf_counter() - started})
        return
    row |= {
        "gate_error": symmetry.gate_error,
        "share": symmetry.permutable_share(),
        "classes": len(symmetry.classes),
        "widenable": sum(c.widenable for c in symmetry.classes),
        "unlisted": [str(op) for op in symmetry.unlisted],
        "seconds": time.perf_counter() - started,
    }
    outcome.send(row)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def line(row: dict[str, Any]) -> str:
    if "refused" in row:
        return f"{row['model']}: refused: {row['refused']}"
    return (
        f"{row['model']}: {row['gate_error']:.0e}, {row['share']:.4f} permutable, {row['seconds']:.1f} s"
        + "".join(f"; {op}" for op in row["unlisted"])
    )


def report(rows: Sequence[dict[str, Any]]) -> str:
    """A summary by origin, then one line per model."""
    parts = []
    for origin, members in (("torchvision", TORCHVISION), ("timm", TIMM)):
        chosen = [row for row in rows if row["model"] in members]
        if chosen:
            parts.append(summary(origin, chosen))
    header = ["model", "parameters (M)", "outcome", "gate error", "permutable", "classes", "widenable", "s"]
    return "\n\n".join([*parts, markdown(header, [cells(row) for row in rows])])


def summary(origin: str, rows: Sequence[dict[str, Any]]) -> str:
    verified = [row for row in rows if "refused" not in row]
    shares = [row["share"] for row in verified]
    return (
        f"{origin}: {len(verified)} of {len(rows)} verified; largest gate error "
        f"{max(row['gate_error'] for row in verified):.0e}; share of parameter elements on a permutable axis: median "
        f"{statistics.median(shares):.4f}, least {min(shares):.4f}; {sum(bool(r['unlisted']) for r in verified)} with "
        "ops without a rule."
    )


def cells(row: dict[str, Any]) -> list[str]:
    start = [row["model"], f"{row.get('parameters', 0) / 1e6:.2f}"]
    if "refused" in row:
        return [*start, f"refused: {row['refused']}", "", "", "", "", f"{row.get('seconds', 0):.1f}"]
    pinned = ", ".join(sorted({op.split(" ")[0] for op in row["unlisted"]}))
    return [
        *start,
        f"verified; pinned by {pinned}" if pinned else "verified",
        f"{row['gate_error']:.0e}",
        f"{row['share']:.4f}",
        str(row["classes"]),
        str(row["widenable"]),
        f"{row['seconds']:.1f}",
    ]


if __name__ == "__main__":
    main()
