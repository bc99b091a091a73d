"""The report's pictures, as SVG text that stands in the page."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from datafree.evaluation.results import Kind, Results, Row, average_of

OURS, REFINED, ORACLE, ENSEMBLE, BASELINE = "#0b6e4f", "#6a3fa0", "#c1666b", "#34344a", "#d08700"
PARENTS = ("#2f6db5", "#8b5a2b", "#7d8ca3", "#b5838d", "#5f7a61")
_DASHES = ("--", "-.", (0, (1, 1)), (0, (5, 1)), (0, (3, 1, 1, 1)))
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.edgecolor": "#888888",
    "axes.axisbelow": True,
    "svg.hashsalt": "datafree",  # the same picture is the same text
    "svg.fonttype": "path",
}
_MARKERS = "osD^vPX*"
_MOST_PANELS = 4

Score = Callable[[Row], float | None]


def accuracy_chart(results: Results) -> str | None:
    """Accuracy against real FLOPs, the parents and the ensemble as lines; None where nothing was evaluated."""
    panels = _panels(results)
    if not panels:
        return None
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(max(5.2, 3.6 * len(panels)), 3.7), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, (title, score) in zip(axes, panels, strict=True):
            _curve(axis, results, score)
            axis.set_title(title, fontsize=10, loc="left")
            axis.set_xlabel("multiply-adds relative to one parent")
        axes[0].set_ylabel("accuracy, %")
        shown = {
            label: handle
            for axis in axes
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            list(shown.values()),
            list(shown),
            loc="outside lower center",
            ncols=4,
            frameon=False,
            fontsize=8.5,
        )
        return _svg(figure)


def residual_chart(results: Results) -> str | None:
    """Relative residual of every layer, one line per merged network; None without least squares."""
    shown = [(point, layers) for point, layers in results.layers.items() if layers]
    if not shown:
        return None
    names = [layer.name for layer in shown[0][1]]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(min(12.0, max(5.2, 0.24 * len(names) + 2)), 3.4), layout="constrained")
        axis = figure.subplots()
        shades = mpl.colormaps["viridis"]
        for number, (point, layers) in enumerate(shown):
            shade = shades(0.15 + 0.7 * number / max(1, len(shown) - 1))
            values = [100 * layer.residual for layer in layers]
            marker = _MARKERS[number % len(_MARKERS)]
            axis.plot(
                range(len(values)), values, color=shade, marker=marker, ms=3.5, lw=1.2, label=point.label
            )
        axis.set_ylabel("residual of the solve,\n% of the target's variance")
        axis.set_ylim(bottom=0)
        step = -(-len(names) // 40)
        axis.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=6.5)
        figure.legend(loc="outside upper center", frameon=False, fontsize=8.5, ncols=6)
        return _svg(figure)


def refine_chart(refined: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What refining did against the time it took, one line per network; None where nothing was refined.

    Agreement with the parents on held-out proxies, which decided; beside it the accuracy, where there is any.
    """
    if not refined:
        return None
    judged = any(told["curve"] for told in refined.values())
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.6 if judged else 5.2, 3.5), layout="constrained")
        axes = figure.subplots(1, 1 + judged, squeeze=False)[0]
        shades = mpl.colormaps["plasma"]
        for number, (label, told) in enumerate(refined.items()):
            looks = [(0.0, told["start"]), *((look["seconds"], look["evidence"]) for look in told["history"])]
            style = {
                "color": shades(0.1 + 0.7 * number / max(1, len(refined) - 1)),
                "marker": _MARKERS[number % len(_MARKERS)],
                "lw": 1.2,
            }
            seconds = [second for second, _ in looks]
            agreement = [100 * _mean(evidence["agreement"].values()) for _, evidence in looks]
            axes[0].plot(seconds, agreement, ms=3.5, label=label, **style)
            if told["curve"]:
                seconds = [look["seconds"] for look in told["curve"]]
                axes[1].plot(seconds, [100 * look["average"] for look in told["curve"]], ms=5, **style)
        axes[0].set_ylabel("agreement with the parents\non held-out proxies (%)")
        if judged:
            axes[1].set_ylabel("accuracy, mean of the tasks (%)")
        for axis in axes:
            axis.set_xlabel("seconds of refining")
        figure.legend(loc="outside upper center", frameon=False, fontsize=8.5, ncols=6)
        return _svg(figure)


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _panels(results: Results) -> list[tuple[str, Score]]:
    tasks: list[tuple[str, Score]] = [(task, _task_score(task)) for task in results.tasks]
    if len(tasks) <= 1:
        return tasks
    panels: list[tuple[str, Score]] = [("average of the tasks", lambda row: average_of(results, row))]
    if results.joint:
        panels.append(("among all labels", lambda row: row.evaluation.joint))
    return [*panels, *tasks][:_MOST_PANELS]


def _task_score(task: str) -> Score:
    def score(row: Row) -> float | None:
        found = row.evaluation.score(task)
        return None if found is None else found.accuracy

    return score


def _curve(axis: Axes, results: Results, score: Score) -> None:
    lines = [
        (row, PARENTS[number % len(PARENTS)], _DASHES[number % len(_DASHES)])
        for number, row in enumerate(results.of_kind("parent"))
    ]
    for row, colour, style in [*lines, *((row, ENSEMBLE, ":") for row in results.of_kind("ensemble"))]:
        value = score(row)
        if value is not None:
            axis.axhline(100 * value, color=colour, ls=style, lw=1.3, label=row.title)
    for name, marker in (("plain average", "x"), ("permutation only", "+")):
        values = [(row.ratio, score(row)) for row in results.of_kind("baseline") if row.name == name]
        points = [(ratio, 100 * value) for ratio, value in values if value is not None]
        if points:
            x, y = zip(*points, strict=True)
            axis.plot(x, y, marker=marker, ms=8, mew=1.8, ls="none", color=BASELINE, label=name)
    kinds: tuple[tuple[Kind, str, str], ...] = (
        ("oracle", ORACLE, "--"),
        ("merged", OURS, "-"),
        ("refined", REFINED, "-"),
    )
    for name, colour, style in kinds:
        values = sorted((row.ratio, score(row)) for row in results.of_kind(name) if score(row) is not None)
        if values:
            x = [ratio for ratio, _ in values]
            y = [100 * value for _, value in values if value is not None]
            label = {"oracle": "merged from real images (oracle)", "merged": "least squares"}.get(name, name)
            axis.plot(x, y, color=colour, ls=style, marker="o", ms=5, lw=1.8, label=label)
    axis.set_xlim(0.95, max(2.05, *(row.ratio for row in results.rows)))


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
