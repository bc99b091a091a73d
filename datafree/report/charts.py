"""The report's pictures, one pair of axes each: the page lays them out and writes their legends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from datafree.evaluation.results import Kind, Results, Row, average_of
from datafree.evaluation.verdict import value_of
from datafree.report import themed
from datafree.report.themed import DASHES, MARKERS, PARENTS, POINTS, Key, Picture, dashes, picture

Score = Callable[[Row], float | None]

_RELATIVE = "multiply-adds relative to one parent"
_MOST_PANELS = 4
_OURS: tuple[tuple[Kind, str, str, str], ...] = (
    ("oracle", "merged from real images", themed.ORACLE, "5 2"),
    ("merged", "least squares", themed.OURS, ""),
    ("refined", "refined", themed.REFINED, ""),
)


def cost_charts(results: Results) -> list[Picture]:
    """Accuracy against real multiply-adds, for tasks and their mean; without tasks, agreement with the parents."""
    keys = _cost_keys(results)

    def draw(score: Score, title: str, unit: str) -> Callable[[Axes], None]:
        def on(axis: Axes) -> None:
            _curve(axis, results, score)
            axis.set_title(title, fontsize=10, loc="left")
            axis.set_xlabel(_RELATIVE)
            axis.set_ylabel(unit)

        return on

    return [
        picture(f"cost{number}", f"{title}: {unit} against {_RELATIVE}", draw(score, title, unit), keys)
        for number, (title, score, unit) in enumerate(_panels(results))
    ]


def _panels(results: Results) -> list[tuple[str, Score, str]]:
    accuracy = "accuracy (%)"
    tasks: list[tuple[str, Score, str]] = [(task, _task_score(task), accuracy) for task in results.tasks]
    if not tasks:
        if not any(row.fidelity for row in results.rows):
            return []
        return [
            ("with the parents", lambda row: value_of(results, row, "agreement"), "agreement on proxies (%)")
        ]
    if len(tasks) == 1:
        return tasks
    panels: list[tuple[str, Score, str]] = [
        ("average of the tasks", lambda row: average_of(results, row), accuracy)
    ]
    if results.joint:
        panels.append(("among all labels", lambda row: row.evaluation.joint, accuracy))
    return [*panels, *tasks][:_MOST_PANELS]


def _task_score(task: str) -> Score:
    def score(row: Row) -> float | None:
        found = row.evaluation.score(task)
        return None if found is None else found.accuracy

    return score


def _cost_keys(results: Results) -> tuple[Key, ...]:
    keys = [
        Key(row.title, PARENTS[number % len(PARENTS)], DASHES[number % len(DASHES)], marker="none")
        for number, row in enumerate(results.of_kind("parent"))
    ]
    if results.of_kind("ensemble"):
        keys.append(Key("ensemble", themed.ENSEMBLE, "1 3", marker="none"))
    keys += [Key(label, colour, dash) for kind, label, colour, dash in _OURS if results.of_kind(kind)]
    if _others(results):
        keys.append(Key("plain averages and other methods", themed.OTHER, None, "cross"))
    return tuple(keys)


def _others(results: Results) -> list[Row]:
    return [row for row in results.rows if row.kind in ("baseline", "comparator")]


def _curve(axis: Axes, results: Results, score: Score) -> None:
    lines = [
        (row, PARENTS[number % len(PARENTS)], dashes(number))
        for number, row in enumerate(results.of_kind("parent"))
    ]
    for row, colour, style in [*lines, *((row, themed.ENSEMBLE, ":") for row in results.of_kind("ensemble"))]:
        value = score(row)
        if value is not None:
            axis.axhline(100 * value, color=colour, ls=style, lw=1.4)
    others = [(row.ratio, score(row), row.title) for row in _others(results)]
    known = [(ratio, 100 * value, title) for ratio, value, title in others if value is not None]
    if known:
        axis.plot(
            [x for x, _, _ in known],
            [y for _, y, _ in known],
            marker="x",
            ms=6,
            mew=1.6,
            ls="none",
            color=themed.OTHER,
        )
        x, y, title = max(known, key=lambda one: one[1])
        axis.annotate(title, (x, y), (5, -3), textcoords="offset points", fontsize=7.5, color=themed.OTHER)
    for kind, _, colour, dash in _OURS:
        values = sorted(
            (row.ratio, value) for row in results.of_kind(kind) if (value := score(row)) is not None
        )
        if values:
            style = dashes(0) if dash else "-"
            x, y = [ratio for ratio, _ in values], [100 * value for _, value in values]
            axis.plot(x, y, color=colour, ls=style, marker="o", ms=4.5, lw=1.8)
    axis.set_xlim(0.95, max(2.05, *(row.ratio + 0.05 for row in results.rows)))


def error_chart(results: Results) -> Picture | None:
    """The error of the outputs that the proxies predict beside what the test images show, over multiply-adds."""
    rows = sorted(results.of_kind("merged"), key=lambda row: row.ratio)
    predicted = [(row.ratio, error) for row in rows if (error := predicted_error(row)) is not None]
    if not predicted:
        return None
    achieved = [(row.ratio, error) for row in rows if (error := achieved_error(row)) is not None]
    keys = [Key("predicted: held-out proxies", themed.OURS, "5 2")]
    if achieved:
        keys.append(Key("achieved: test images, mean of the tasks", themed.ORACLE))

    def draw(axis: Axes) -> None:
        for values, colour, style in ((predicted, themed.OURS, dashes(0)), (achieved, themed.ORACLE, "-")):
            if values:
                axis.plot(
                    [x for x, _ in values],
                    [y for _, y in values],
                    color=colour,
                    ls=style,
                    marker="o",
                    ms=4.5,
                    lw=1.8,
                )
        axis.set_xlabel(_RELATIVE)
        axis.set_ylabel("squared error of the outputs\n(share of their variance)")
        axis.set_ylim(bottom=0)

    return picture(
        "error", "error of the outputs, predicted and achieved, against multiply-adds", draw, tuple(keys)
    )


def predicted_error(row: Row) -> float | None:
    """The error of the outputs on held-out proxies, against the ensemble where that was looked at."""
    return row.predicted if row.fidelity is None else row.fidelity.error


def achieved_error(row: Row) -> float | None:
    """Mean over tasks of the error of the outputs on test images; None where it is not known."""
    errors = [score.error for score in row.evaluation.tasks if score.error is not None]
    return sum(errors) / len(errors) if errors else None


def residual_chart(results: Results) -> Picture | None:
    """Relative residual of every layer, one line per merged network; None without least squares."""
    shown = [(point, layers) for point, layers in results.layers.items() if layers]
    if not shown:
        return None
    names = [layer.name for layer in shown[0][1]]
    lines = [(point.label, [100 * layer.residual for layer in layers]) for point, layers in shown]
    return _by_layer("residual", "residual of the solve\n(% of the target's variance)", names, lines)


def similarity_chart(similarity: Sequence[Mapping[str, Any]]) -> Picture | None:
    """How alike the paired units of the parents are, layer by layer, as they come and matched."""
    if not similarity:
        return None
    names = [layer["layer"] for layer in similarity]
    lines = [(kind, [layer[kind] for layer in similarity]) for kind in ("unmatched", "matched")]
    return _by_layer("similarity", "correlation of paired units\n(mean, 1 is alike)", names, lines)


def _by_layer(
    name: str, unit: str, layers: Sequence[str], lines: Sequence[tuple[str, Sequence[float]]]
) -> Picture:
    colours = [POINTS[min(number, len(POINTS) - 1)] for number in range(len(lines))]

    def draw(axis: Axes) -> None:
        for number, (_, values) in enumerate(lines):
            marker = MARKERS[number % len(MARKERS)]
            axis.plot(range(len(values)), values, color=colours[number], marker=marker, ms=3.5, lw=1.3)
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=min(0.0, *(min(values) for _, values in lines)))
        step = -(-len(layers) // 60)
        axis.set_xticks(range(0, len(layers), step), layers[::step], rotation=90, fontsize=7)

    keys = tuple(Key(label, colour) for (label, _), colour in zip(lines, colours, strict=True))
    width = max(4.4, min(11.0, 0.17 * len(layers) + 1.2))
    return picture(name, f"{unit} by layer", draw, keys, (width, 3.2), wide=width > 5)


def refine_charts(refined: Mapping[str, Mapping[str, Any]]) -> list[Picture]:
    """What refining did against the time it took, one line per network; nothing where nothing was refined.

    Agreement with the parents on held-out proxies, which decided; and the accuracy, where there is any.
    """
    if not refined:
        return []
    agreement, accuracy = [], []
    for told in refined.values():
        looks = [(0.0, told["start"]), *((look["seconds"], look["evidence"]) for look in told["history"])]
        agreement.append([(second, _mean(evidence["agreement"].values())) for second, evidence in looks])
        accuracy.append([(look["seconds"], look["average"]) for look in told["curve"]])
    colours = [POINTS[min(number, len(POINTS) - 1)] for number in range(len(refined))]
    keys = tuple(Key(label, colour) for label, colour in zip(refined, colours, strict=True))

    def draw(lines: Sequence[Sequence[tuple[float, float]]], unit: str) -> Callable[[Axes], None]:
        def on(axis: Axes) -> None:
            for number, line in enumerate(lines):
                x, y = [second for second, _ in line], [100 * value for _, value in line]
                axis.plot(x, y, color=colours[number], marker=MARKERS[number % len(MARKERS)], ms=3.5, lw=1.3)
            axis.set_xlabel("seconds of refining")
            axis.set_ylabel(unit)

        return on

    unit = "agreement with the parents\non held-out proxies (%)"
    found = [picture("refine0", "agreement against seconds of refining", draw(agreement, unit), keys)]
    if any(accuracy):
        unit = "accuracy, mean of the tasks (%)"
        found.append(picture("refine1", "accuracy against seconds of refining", draw(accuracy, unit), keys))
    return found


def barrier_chart(results: Results) -> Picture | None:
    """The loss along the lines between parents."""
    lines = results.barriers
    if not lines:
        return None
    styles = {True: (themed.OURS, "-", ""), False: (themed.OTHER, dashes(0), DASHES[0])}

    def draw(axis: Axes) -> None:
        for line in lines:
            colour, style, _ = styles[line.matched]
            axis.plot(line.at, line.losses, color=colour, ls=style, marker="o", ms=3.5, lw=1.5)
        axis.set_xlabel("place on the line between two parents")
        axis.set_ylabel("negative log-likelihood\n(nats, mean of the tasks)")
        axis.set_ylim(bottom=0)

    keys = tuple(
        Key("units matched" if matched else "units as they come", colour, dash)
        for matched, (colour, _, dash) in styles.items()
    )
    return picture("barrier", "loss along the line between parents", draw, keys)


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
