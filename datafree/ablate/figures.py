"""The plots of a grid as SVG: curves over a numeric axis and over cost, a heat map of settings by budget.

Colours are Okabe and Ito's, and viridis's sister cividis, both told apart by the colour-blind; markers differ as well.
What is ink in a plot takes the ink of the page it stands in, light or dark.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from datafree.ablate.axes import RECIPE, Axis
from datafree.ablate.findings import Findings, Line, Metric
from datafree.ablate.table import judged

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#a6761d")
MARKERS = "osD^vPX*"
MOST_LINES, MOST_PANELS, MOST_ROWS = 8, 4, 40
_INK, _RULE = "#123456", "#abcdef"  # stand for the page's own colours until the text is written
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    "svg.hashsalt": "datafree",  # the same picture is the same text
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Picture:
    """One plot. name: of its file    svg: text, for a page    caption: what it shows"""

    name: str
    svg: str
    caption: str


def pictures(findings: Findings, recipe: str) -> list[Picture]:
    """Every plot that the axes of a grid give for one recipe."""
    found = []
    with mpl.rc_context(_STYLE):
        for metric in findings.metrics(recipe):
            for axis in findings.grid.axes:
                if axis.name != RECIPE and len(axis.numbers) > 1:
                    found.append(_curves(findings, recipe, metric, axis))
            found.append(_costs(findings, recipe, metric))
            found.append(_heat(findings, recipe, metric))
    return [picture for picture in found if picture is not None]


def standalone(svg: str) -> str:
    """A plot as a file of its own, in ink on nothing."""
    return svg.replace("currentColor", "#222222").replace("var(--line)", "#dddddd")


# Curves
# -----------------------------------------------------------------------------------------------------------


def _curves(findings: Findings, recipe: str, metric: Metric, axis: Axis) -> Picture | None:
    """Accuracy over the values of a numeric axis, a panel per budget, a line per setting of the other axes."""
    points = findings.points(recipe)[:MOST_PANELS]
    figure = Figure(figsize=(max(4.6, 2.9 * len(points) + 0.8), 3.6), layout="constrained")
    panels = figure.subplots(1, len(points), squeeze=False, sharey=True)[0]
    for panel, point in zip(panels, points, strict=True):
        series: dict[str, list[tuple[float, list[float]]]] = {}
        level: dict[str, list[tuple[str, float]]] = {}
        for line in _ours(findings, recipe, point):
            values, label = list(line.values(metric).values()), line.labels[axis.name]
            if values and label in axis.numbers:
                series.setdefault(_rest(line, axis.name), []).append((axis.numbers[label], values))
            elif values:
                level.setdefault(_rest(line, axis.name), []).append((label, statistics.mean(values)))
        for place, (rest, spots) in enumerate(list(series.items())[:MOST_LINES]):
            _errorbar(panel, spots, place, rest or "merged")
            for label, value in level.get(rest, []):  # `auto` among numbers
                told = f"{rest}, {label}" if rest else label
                panel.axhline(100 * value, color=COLOURS[place % len(COLOURS)], ls="--", lw=1.1, label=told)
        _scale(panel, sorted(axis.numbers.values()))
        panel.set_title(point, fontsize=9.5, loc="left")
        panel.set_xlabel(axis.name)
    if not any(panel.lines for panel in panels):
        return None
    panels[0].set_ylabel(f"{_short(metric)}, %")
    _legend(figure, panels)
    caption = f"{judged(metric)} over {axis.name}, per budget; bars: standard deviation over seeds."
    return Picture(f"{metric}-over-{axis.name}", _svg(figure), caption)


def _scale(panel: Axes, numbers: Sequence[float]) -> None:
    """Logarithmic where the numbers multiply rather than add up."""
    if numbers[0] > 0 and numbers[-1] / numbers[0] >= 8:
        panel.set_xscale("log")
        panel.set_xticks(numbers, [f"{value:g}" for value in numbers])
        panel.minorticks_off()


def _costs(findings: Findings, recipe: str, metric: Metric) -> Picture | None:
    """Accuracy against real multiply-adds, a line per setting; parents and ensemble as they are."""
    series: dict[str, list[tuple[float, list[float]]]] = {}
    for line in findings.judged(recipe):
        values = list(line.values(metric).values())
        if values:
            cost = statistics.mean(line.values("ratio").values())
            series.setdefault(line.title, []).append((cost, values))
    if not series or max(map(len, series.values())) < 2:
        return None
    best = sorted(series, key=lambda title: -statistics.mean(value for _, v in series[title] for value in v))
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    panel = figure.subplots()
    for place, title in enumerate(title for title in series if title in best[:MOST_LINES]):
        _errorbar(panel, series[title], place, title)
    for kind, style in (("parent", "--"), ("ensemble", ":")):
        lines = [line for line in findings.of(recipe) if line.kind == kind and line.values(metric)]
        values = [value for line in lines for value in line.values(metric).values()]
        if values:
            panel.axhline(100 * statistics.mean(values), color=_INK, ls=style, lw=1.1, label=f"{kind} (mean)")
    panel.set_xlabel("multiply-adds relative to one parent")
    panel.set_ylabel(f"{_short(metric)}, %")
    _legend(figure, [panel])
    more = f" The best {MOST_LINES} of {len(series)} settings." if len(series) > MOST_LINES else ""
    caption = f"{judged(metric)} against real multiply-adds; bars: standard deviation over seeds.{more}"
    return Picture(f"{metric}-over-cost", _svg(figure), caption)


def _errorbar(panel: Axes, spots: Sequence[tuple[float, list[float]]], place: int, label: str) -> None:
    spots = sorted(spots)
    panel.errorbar(
        [x for x, _ in spots],
        [100 * statistics.mean(values) for _, values in spots],
        yerr=[100 * statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in spots],
        color=COLOURS[place % len(COLOURS)],
        marker=MARKERS[place % len(MARKERS)],
        ms=4.5,
        lw=1.5,
        capsize=2.5,
        label=label,
    )


def _rest(line: Line, axis: str) -> str:
    """The setting without one axis, and the network where it is another than the merged one."""
    told = [f"{name} {label}" for name, label in line.labels.items() if name != axis]
    return ", ".join([*told, *([line.network] if line.kind != "merged" else [])])


# Heat map
# -----------------------------------------------------------------------------------------------------------


def _heat(findings: Findings, recipe: str, metric: Metric) -> Picture | None:
    """Settings by budgets, the mean written into every cell."""
    points = findings.points(recipe)
    values: dict[str, dict[str, float]] = {}
    for point in points:
        for line in findings.compared(recipe, point):
            found = line.values(metric)
            if found:
                values.setdefault(line.title, {})[point] = 100 * statistics.mean(found.values())
    titles = list(values)[:MOST_ROWS]
    if len(titles) < 2:
        return None
    nothing = float("nan")
    grid = [[values[title].get(point, nothing) for point in points] for title in titles]
    longest = max(map(len, titles))
    size = (1.2 + 0.075 * longest + 0.95 * len(points), 0.9 + 0.27 * len(titles))
    figure = Figure(figsize=size, layout="constrained")
    panel = figure.subplots()
    panel.pcolormesh(grid, cmap="cividis", linewidth=0.3, edgecolors="face")  # no gaps between neighbours
    panel.invert_yaxis()
    shown = [number for found in values.values() for number in found.values()]
    middle = (min(shown) + max(shown)) / 2
    panel.grid(False)
    panel.set_xticks([column + 0.5 for column in range(len(points))], points)
    panel.set_yticks([row + 0.5 for row in range(len(titles))], titles)
    panel.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    for side in ("left", "bottom"):
        panel.spines[side].set_visible(False)
    for row, numbers in enumerate(grid):
        for column, number in enumerate(numbers):
            if number == number:  # not every network has every budget
                shade = "white" if number <= middle else "black"
                panel.text(
                    column + 0.5,
                    row + 0.5,
                    f"{number:.1f}",
                    ha="center",
                    va="center",
                    color=shade,
                    fontsize=8.5,
                )
    more = f" The first {MOST_ROWS} of {len(values)}." if len(values) > MOST_ROWS else ""
    return Picture(f"{metric}-heat", _svg(figure), f"{judged(metric)} in per cent, mean over seeds.{more}")


# What plots share
# -----------------------------------------------------------------------------------------------------------


def _ours(findings: Findings, recipe: str, point: str) -> list[Line]:
    return [line for line in findings.compared(recipe, point) if line.kind in ("merged", "refined")]


def _short(metric: Metric) -> str:
    return "joint accuracy" if metric == "joint" else "accuracy"


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    shown = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    longest = max(map(len, shown), default=0)
    columns = max(1, min(4, int(figure.get_figwidth() * 14 / (longest + 6))))
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=columns, frameon=False)


def _svg(figure: Figure) -> str:
    figure.patch.set_alpha(0)
    for panel in figure.axes:
        panel.patch.set_alpha(0)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor").replace(_RULE, "var(--line)")
