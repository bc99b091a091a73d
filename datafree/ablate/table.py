"""What was found, as tidy rows for other programs and as tables for people."""

from __future__ import annotations

import csv
import io
import itertools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datafree.ablate.findings import Findings, Line, Metric, as_listed

_NUMBERS = ("average", "joint", "predicted", "propagate", "ratio", "flops", "parameters")


# Tidy rows
# -----------------------------------------------------------------------------------------------------------


def tidy(findings: Findings) -> list[dict[str, Any]]:
    """One flat row per network and cell: axes, seed, network, cost, accuracies, seconds of the cell."""
    axes = [axis.name for axis in findings.grid.axes]
    rows = []
    for cell in as_listed(findings.grid, findings.cells):
        entry = findings.entries.get(cell.fingerprint)
        if entry is None:
            continue
        for row in entry.rows:
            point = row["point"] or {"kind": None, "value": None}
            rows.append(
                {
                    **{axis: cell.labels[axis] for axis in axes},
                    "seed": cell.seed,
                    "kind": row["kind"],
                    "network": row["network"],
                    "budget": point["value"] if point["kind"] == "budget" else None,
                    "apart": point["value"] if point["kind"] == "apart" else None,
                    **{f"accuracy {task}": value for task, value in row["tasks"].items()},
                    **{key: row[key] for key in _NUMBERS},
                    **{f"proxies {name}": value for name, value in entry.scores.items()},
                    "seconds": entry.seconds,
                    "cell": cell.fingerprint[:16],
                }
            )
    return rows


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows under one header; a network without a column's value leaves it empty."""
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    columns.sort(key=_column)  # tasks of the second recipe stand beside those of the first
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _column(name: str) -> int:
    """Axes and networks, accuracies, what else is known of a network, of the proxies, of the cell."""
    if name.startswith(("accuracy ", "proxies ")):
        return 1 if name.startswith("accuracy ") else 3
    return 2 if name in _NUMBERS else 4 if name in ("seconds", "cell") else 0


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# In words
# -----------------------------------------------------------------------------------------------------------


def spread(values: Iterable[float], digits: int = 1, times: float = 100.0) -> str:
    """Mean ± standard deviation over seeds; the mean alone where all are one number; a dash of none."""
    known = [times * value for value in values]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.{digits}f}"
    return mean if len(set(known)) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


@dataclass(frozen=True)
class Table:
    """A table as text. left: how many columns hold words"""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1


def headline(findings: Findings, recipe: str, metric: Metric) -> Table:
    """One row per setting and network, one column per budget."""
    points = findings.points(recipe)
    cells: dict[str, dict[str, str]] = {}
    for point in points:
        for line in findings.compared(recipe, point):
            cells.setdefault(line.title, {})[point] = spread(line.values(metric).values())
    for line in findings.judged(recipe):
        if not line.point and not line.cheapest:  # a method that chooses what it costs
            cost = spread(line.values("ratio").values(), 2, 1)
            cells.setdefault(line.title, {})[_ELSEWHERE] = (
                f"{spread(line.values(metric).values())} at {cost}x"
            )
    columns = [*points, *([_ELSEWHERE] if any(_ELSEWHERE in found for found in cells.values()) else [])]
    rows = [(title, *(found.get(column, "-") for column in columns)) for title, found in cells.items()]
    return Table(judged(metric), ("network", *columns), tuple(rows))


_ELSEWHERE = "at another cost"


def references(findings: Findings, recipe: str) -> Table:
    """What the networks are held against; a reference that is the same in every cell is one row."""
    columns = ("network", *_judges(findings, recipe), "ratio")
    rows: dict[tuple[str, ...], None] = {}
    for line in findings.of(recipe):
        if line.kind in ("parent", "ensemble"):
            rows[(line.network, *_scores(findings, line))] = None
    return Table("parents and ensemble", columns, tuple(rows))


def everything(findings: Findings, recipe: str) -> Table:
    """Every network of every setting, mean ± standard deviation over its seeds."""
    columns = (
        *findings.axes,
        "network",
        "point",
        "seeds",
        *_judges(findings, recipe),
        "ratio",
        "predicted",
        "s",
    )
    rows = []
    for line in findings.of(recipe):
        if line.kind in ("parent", "ensemble"):
            continue
        predicted = line.values("predicted").values()
        rows.append(
            (
                *line.labels.values(),
                line.network,
                line.point,
                str(len(line.rows)),
                *_scores(findings, line),
                spread(predicted, 3, 1),
                spread(line.values("seconds").values(), 0, 1),
            )
        )
    return Table("all networks", columns, tuple(rows), left=len(findings.axes) + 2)


def _judges(findings: Findings, recipe: str) -> tuple[str, ...]:
    """Tasks, their average where there are several, joint accuracy where there is one."""
    tasks, metrics = findings.tasks(recipe), findings.metrics(recipe)
    return (*tasks, *(metric for metric in metrics if metric != "average" or len(tasks) > 1))


def _scores(findings: Findings, line: Line) -> list[str]:
    shown = [
        line.values(name) if name in ("average", "joint") else line.task(name)
        for name in _judges(findings, line.recipe)
    ]
    return [*(spread(values.values()) for values in shown), spread(line.values("ratio").values(), 3, 1)]


def ranks(findings: Findings, recipe: str, point: str, metric: Metric) -> Table:
    rows = []
    for place in findings.ranking(recipe, point, metric):
        values, predicted = place.line.values(metric), place.line.values("predicted")
        rows.append(
            (place.line.title, str(place.rank), spread(values.values()), spread(predicted.values(), 3, 1))
        )
    title = f"{judged(metric)}, {point}"
    return Table(title, ("network", "rank", "%", "predicted"), tuple(rows))


def foretellers(findings: Findings, recipe: str, metric: Metric) -> Table:
    """Spearman's correlations with the metric over the settings, one column per point."""
    points = findings.points(recipe)
    told = {point: findings.foretold(recipe, point, metric) for point in points}
    names = dict.fromkeys(name for found in told.values() for name in found)
    rows = [
        (_SCORES.get(name, name), *(f"{told[p][name]:+.2f}" if name in told[p] else "-" for p in points))
        for name in names
    ]
    return Table(judged(metric), ("known without labels", *points), tuple(rows))


_SCORES = {
    "predicted": "predicted error of the outputs",
    "spread": "spread of predictions",
    "bn_log_var": "batch-norm distance",
    "agreement": "agreement of the parents",
    "effective_rank": "effective rank",
    "dead_directions": "dead directions",
}


def judged(metric: Metric) -> str:
    """A metric in words."""
    return "Accuracy among all labels" if metric == "joint" else "Accuracy, average of the tasks"


def markdown(table: Table) -> str:
    header = "| " + " | ".join(_safe(cell) for cell in table.columns) + " |"
    rule = (
        "|" + "|".join("---" if number < table.left else "--:" for number in range(len(table.columns))) + "|"
    )
    return "\n".join([header, rule, *("| " + " | ".join(map(_safe, row)) + " |" for row in table.rows)])


def _safe(cell: str) -> str:
    return " ".join(cell.replace("|", "\\|").split())
