"""Matplotlib figures of results: each call gives a new Figure, which notebooks show and `savefig` writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

Curve = tuple[str, Sequence[float], Sequence[float]]  # name, ratios, values
_GAP = 2  # pixels between images


def curves(lines: Sequence[Curve], levels: Sequence[tuple[str, float]], quantity: str) -> Figure:
    """A quantity against multiply-adds relative to one parent; levels: horizontal lines, such as the ensemble."""
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axis = figure.subplots()
    for name, ratios, values in lines:
        axis.plot(ratios, values, "o-" if len(ratios) > 1 else "o", label=name)
    for number, (name, value) in enumerate(levels):
        axis.axhline(
            value, linestyle=("--", ":", "-.")[number % 3], color=f"C{number + len(lines)}", label=name
        )
    axis.set_xlabel("multiply-adds relative to one parent")
    axis.set_ylabel(quantity)
    axis.grid(visible=True, color="#e6e6e6")
    if lines or levels:
        axis.legend(frameon=False, fontsize=8)
    return figure


def bars(names: Sequence[str], values: Sequence[float], quantity: str) -> Figure:
    """One horizontal bar a name, the first on top."""
    figure = Figure(figsize=(5.2, 0.8 + 0.32 * len(names)), layout="constrained")
    axis = figure.subplots()
    places = range(len(names))
    axis.barh(list(places), list(values))
    axis.set_yticks(list(places), list(names))
    axis.invert_yaxis()
    axis.set_xlabel(quantity)
    return figure


def sheet(images: Tensor, columns: int) -> Figure:
    """uint8 (n, C, H, W) beside each other."""
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    pixels = images.expand(-1, 3, -1, -1) if channels == 1 else images[:, :3]
    canvas = torch.full((3, rows * (height + _GAP), columns * (width + _GAP)), 255, dtype=torch.uint8)
    for number, image in enumerate(pixels):
        top, left = number // columns * (height + _GAP), number % columns * (width + _GAP)
        canvas[: image.shape[0], top : top + height, left : left + width] = image
    figure = Figure(figsize=(0.45 * columns, 0.45 * rows), layout="constrained")
    axis = figure.subplots()
    axis.imshow(canvas.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.axis("off")
    return figure
