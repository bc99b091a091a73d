"""What stands in the report's tables, as plain values for its template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datafree.evaluation.measures import Interval, confusion
from datafree.evaluation.results import Kind, Results, Row, average_of, cells, columns
from datafree.evaluation.scores import TaskScore
from datafree.report.charts import achieved_error, predicted_error

GROUPS: Mapping[Kind, str] = {
    "parent": "One parent alone",
    "ensemble": "All parents together",
    "baseline": "Plain averages",
    "comparator": "Other methods, one network",
    "merged": "Merged by least squares",
    "refined": "Merged and refined",
    "oracle": "Merged from real images",
}
MOST_CLASSES = 12  # in a confusion table; of more classes the pairs that are mistaken most are listed
LIGHTS = {
    "good": (
        "\u25cf",
        "all classes occur as the parents know them: merges came close to those from real images",
    ),
    "fair": (
        "\u25d0",
        "usable: merges lost some accuracy against real images; refining and larger budgets pay",
    ),
    "poor": (
        "\u25cb",
        "the parents see something unlike their training images: better proxies before anything else",
    ),
}


def headline(results: Results) -> dict[str, Any]:
    """The table of the networks in groups; a cell is its text and, small below it, its interval."""
    own = None if results.verdict is None else results.verdict.row
    groups = []
    for kind, title in GROUPS.items():
        rows = [
            {
                "cells": list(zip(cells(results, row), _below(results, row), strict=True)),
                "ours": kind in ("merged", "refined"),
                "own": row is own,
                "note": row.note,
            }
            for row in results.of_kind(kind)
        ]
        if rows:
            groups.append({"title": title, "rows": rows})
    return {"columns": columns(results), "groups": groups}


def _below(results: Results, row: Row) -> list[str]:
    found = [score.interval if (score := row.evaluation.score(task)) else None for task in results.tasks]
    if len(results.tasks) > 1:
        found.append(None if average_of(results, row) is None else row.evaluation.interval)
    if results.joint:
        found.append(row.evaluation.joint_interval)
    shown = ["", *(_span(interval) for interval in found)]
    return shown + [""] * (len(columns(results)) - len(shown))


def _span(interval: Interval | None) -> str:
    return "" if interval is None else f"{100 * interval[0]:.1f}\u2013{100 * interval[1]:.1f}"


def task_table(results: Results) -> list[list[str]]:
    """Task by task what else was measured, of the network in the verdict and of the ensemble beside it."""
    own = None if results.verdict is None else results.verdict.row
    rows = []
    for task in results.tasks:
        for row in (own, *results.of_kind("ensemble")):
            score = None if row is None else row.evaluation.score(task)
            if row is not None and score is not None:
                rows.append([task, row.label, *_measures(score)])
    return rows


def _measures(score: TaskScore) -> list[str]:
    name, lowest = score.worst_class
    return [
        f"{100 * score.accuracy:.1f}",
        _percent(score.normalised, 0),
        _percent(score.top5, 1),
        _number(score.nll, 3),
        _number(score.calibration, 3),
        _number(score.error, 3),
        f"{name} {100 * lowest:.1f}",
        str(score.count),
    ]


def error_table(results: Results) -> list[list[str]]:
    """Networks of ours: error of the outputs predicted on held-out proxies, and achieved on test images."""
    rows = [row for row in results.rows if row.kind in ("merged", "refined", "oracle")]
    return [[row.label, _number(predicted_error(row), 3), _number(achieved_error(row), 3)] for row in rows]


def confusions(results: Results) -> list[dict[str, Any]]:
    """What the network in the verdict takes for what, task by task."""
    own = None if results.verdict is None else results.verdict.row
    if own is None:
        return []
    return [_confusion(score) for score in own.evaluation.tasks if len(score.targets)]


def _confusion(score: TaskScore) -> dict[str, Any]:
    names, targets = list(score.per_class), sorted(set(score.targets.tolist()))
    table = confusion(score.targets, score.predictions, targets)
    shares = table / table.sum(1, keepdims=True)
    if len(names) <= MOST_CLASSES:
        other = bool(table[:, -1].any())
        grid = [row[: len(names) + other].tolist() for row in shares]
        return {"task": score.task, "names": names, "other": other, "grid": grid, "pairs": None}
    mistakes = [
        (shares[i, j], int(table[i, j]), names[i], names[j] if j < len(names) else "another class")
        for i in range(len(names))
        for j in range(len(names) + 1)
        if i != j and table[i, j]
    ]
    worst = sorted(mistakes, key=lambda one: (-one[1], one[2], one[3]))[:8]
    pairs = [{"share": share, "count": n, "right": right, "taken": taken} for share, n, right, taken in worst]
    return {"task": score.task, "names": names, "other": False, "grid": None, "pairs": pairs}


def widths(plan: Mapping[str, Any], parents: Sequence[str]) -> list[dict[str, Any]]:
    """Groups of units as bars: the whole bar is every parent's units apart."""
    bars = []
    for row in plan["classes"]:
        whole = row["units"] * len(parents)
        parts = [
            {
                "label": owners,
                "count": count,
                "colour": _colour(owners, parents),
                "percent": 100 * count / whole,
            }
            for owners, count in row["owners"].items()
            if count
        ]
        bars.append({**row, "parts": sorted(parts, key=lambda part: -part["label"].count("+"))})
    return bars


def _colour(owners: str, parents: Sequence[str]) -> str:
    own = owners.split(" + ")
    if len(own) == len(parents):
        return "var(--ours)"
    return (
        f"var(--parent-{parents.index(own[0]) % 3})" if len(own) == 1 and own[0] in parents else "var(--soft)"
    )


def timings(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Stages with their share of the longest, and the most memory the process had held when they ended (MiB)."""
    longest, memory = max([*run["timings"].values(), 1e-9]), run.get("memory", {})
    return [
        {"stage": stage, "seconds": seconds, "percent": 100 * seconds / longest, "memory": memory.get(stage)}
        for stage, seconds in run["timings"].items()
    ]


def _percent(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
