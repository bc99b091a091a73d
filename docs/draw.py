"""The three figures of docs/design.md: `python docs/draw.py` writes them into docs/images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

A, B, BOTH, INK, PALE = "#2f6db5", "#c1666b", "#0b6e4f", "#34344a", "#f4f4f6"
_STYLE: dict[Any, Any] = {"svg.hashsalt": "datafree", "svg.fonttype": "path", "font.size": 10}


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(0, width)
    axis.set_ylim(0, height)
    axis.axis("off")
    return figure, axis


def flow() -> Figure:
    """What becomes of what, with the function that does it."""
    figure, axis = canvas(10.6, 2.5)
    boxes = [
        (0.1, 1.45, "parents", "recipe, modules"),
        (0.1, 0.35, "proxies", "inversion, images"),
        (1.95, 0.9, "moments", "gather"),
        (3.7, 0.9, "common order", "match"),
        (5.45, 0.9, "plan", "make_plan"),
        (7.2, 0.9, "walk", "assemble"),
        (8.95, 0.9, "one network", "table, card, report"),
    ]
    for x, y, title, below in boxes:
        box(axis, x, y, 1.4, 0.7, title, below)
    for start, end in (((1.5, 1.8), (1.93, 1.4)), ((1.5, 0.7), (1.93, 1.1))):
        arrow(axis, start, end)
    for x in (3.35, 5.1, 6.85, 8.6):
        arrow(axis, (x, 1.25), (x + 0.33, 1.25))
    axis.plot([0.8, 0.8, 7.9], [0.33, 0.1, 0.1], color="#9a9aa8", lw=1)
    arrow(axis, (7.9, 0.1), (7.9, 0.88), "#9a9aa8")
    said = "proxies are read again: every layer is solved on what the merged network gives it"
    axis.text(4.5, 0.24, said, color="#6b6b7a", ha="center", fontsize=8.5)
    return figure


def box(axis: Axes, x: float, y: float, width: float, height: float, title: str, below: str) -> None:
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", fc=PALE, ec=INK, lw=1
    )
    axis.add_patch(shape)
    axis.text(
        x + width / 2, y + 0.45, title, ha="center", va="center", color=INK, weight="bold", fontsize=9.5
    )
    axis.text(x + width / 2, y + 0.2, below, ha="center", va="center", color="#6b6b7a", fontsize=8)


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    drawn = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=11, color=colour, lw=1, shrinkA=0, shrinkB=0
    )
    axis.add_patch(drawn)


def widened_axis() -> Figure:
    """Five units of each parent, two kept apart: the axis of the merged network, unit by unit."""
    figure, axis = canvas(8.2, 2.7)
    for row, (name, colour) in enumerate((("parent A", A), ("parent B", B))):
        y = 2.05 - 0.6 * row
        axis.text(0.1, y + 0.2, name, va="center", color=INK)
        for unit in range(5):
            cell(axis, 1.5 + 0.6 * unit, y, str(unit), colour)
    axis.text(
        4.75,
        1.85,
        "units 1 and 4 are least alike:\nthey stay apart, the others are shared",
        va="center",
        color="#6b6b7a",
        fontsize=9,
    )
    axis.text(0.1, 0.65, "merged", va="center", color=INK)
    merged = [("1", A), ("4", A), ("0", BOTH), ("2", BOTH), ("3", BOTH), ("1", B), ("4", B)]
    for place, (unit, colour) in enumerate(merged):
        cell(axis, 1.5 + 0.6 * place, 0.45, unit, colour)
    for first, last, text, colour in (
        (0, 1, "owner A", A),
        (2, 4, "owners A and B", BOTH),
        (5, 6, "owner B", B),
    ):
        middle = 1.5 + 0.6 * (first + last) / 2 + 0.25
        axis.text(middle, 0.2, text, ha="center", va="center", color=colour, fontsize=8.5)
    return figure


def cell(axis: Axes, x: float, y: float, text: str, colour: str) -> None:
    axis.add_patch(Rectangle((x, y), 0.5, 0.42, fc=colour, ec="white"))
    axis.text(x + 0.25, y + 0.2, text, ha="center", va="center", color="white", weight="bold")


def blocks() -> Figure:
    """Which owners' units read which: the blocks of a layer's weight."""
    figure, axis = canvas(6.4, 3.6)
    owners = [("A", A, 0.8), ("A and B", BOTH, 1.2), ("B", B, 0.8)]
    top, left = 2.95, 1.4
    for row, (reader, colour, height) in enumerate(owners):
        y = top - sum(h for _, _, h in owners[: row + 1])
        axis.text(left - 0.15, y + height / 2, reader, ha="right", va="center", color=colour, weight="bold")
        for column, (read, tint, width) in enumerate(owners):
            x = left + sum(w for _, _, w in owners[:column])
            kept = {row, column} != {0, 2}
            axis.add_patch(Rectangle((x, y), width, height, fc="#dcebe4" if kept else "white", ec=INK, lw=1))
            axis.text(
                x + width / 2,
                y + height / 2,
                "solved" if kept else "0",
                ha="center",
                va="center",
                color=INK if kept else "#9a9aa8",
            )
            if row == 0:
                axis.text(
                    x + width / 2, top + 0.15, read, ha="center", va="center", color=tint, weight="bold"
                )
    axis.text(left + 1.4, top + 0.45, "units that are read", ha="center", color="#6b6b7a")
    axis.text(0.22, top - 1.4, "units that read", rotation=90, va="center", ha="center", color="#6b6b7a")
    axis.text(
        4.5,
        1.55,
        "Units without a common\nowner do not meet: these\nblocks are neither stored\nnor computed.",
        va="center",
        color="#6b6b7a",
        fontsize=9,
    )
    return figure


FIGURES = {"flow": flow, "axis": widened_axis, "blocks": blocks}


def main(folder: Path, kind: str) -> None:
    with mpl.rc_context(_STYLE):
        for name, draw in FIGURES.items():
            meta = {"Date": None} if kind == "svg" else None
            draw().savefig(folder / f"{name}.{kind}", format=kind, metadata=meta, dpi=110, facecolor="white")


if __name__ == "__main__":
    main(
        Path(sys.argv[1]) if len(sys.argv) > 1 else Path("docs/images"),
        sys.argv[2] if len(sys.argv) > 2 else "svg",
    )
