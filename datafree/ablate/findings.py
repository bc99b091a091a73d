"""What the cells of a grid found: the same networks together over all seeds, and which of them are better."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import spearmanr
from scipy.stats import t as student

from datafree.ablate.axes import RECIPE
from datafree.ablate.book import Entry
from datafree.ablate.grid import Cell, Grid

REFERENCES = ("parent", "ensemble", "oracle")  # not made from proxies
CONFIDENCE = 0.95
Metric = str  # "average" or "joint"


@dataclass(frozen=True)
class Line:
    """One network of one setting over all seeds.

    labels: axis -> label, without the recipe    point: "budget 1.25", "" for a network that has no budget
    rows:   seed -> its row in the book
    """

    recipe: str
    labels: Mapping[str, str]
    kind: str
    network: str
    point: str
    rows: Mapping[int, Mapping[str, Any]]

    @property
    def title(self) -> str:
        """The setting, and the network where it is not simply the merged one."""
        told = [label if axis == "source" else f"{axis} {label}" for axis, label in self.labels.items()]
        return ", ".join([*told, *([self.network] if self.kind != "merged" or not told else [])])

    def values(self, metric: Metric) -> dict[int, float]:
        """Seed -> value, for the seeds that have one."""
        return {seed: row[metric] for seed, row in self.rows.items() if row[metric] is not None}

    def score(self, name: str) -> float | None:
        """Mean over seeds of a score of the proxies, or of the predicted error."""
        told = [
            row["predicted"] if name == "predicted" else row["scores"].get(name) for row in self.rows.values()
        ]
        known = [value for value in told if value is not None]
        return statistics.mean(known) if known else None

    def task(self, name: str) -> dict[int, float]:
        return {seed: row["tasks"][name] for seed, row in self.rows.items() if name in row["tasks"]}

    @property
    def cheapest(self) -> bool:
        """Whether it costs what one parent costs, by its budget or by what it is."""
        return all(abs(row["ratio"] - 1) < 0.005 for row in self.rows.values())


@dataclass(frozen=True)
class Place:
    """One network in the order of a point. rank: one more than the networks that are better beyond chance."""

    rank: int
    line: Line


@dataclass(frozen=True)
class Findings:
    """The finished cells of a grid. lines: in the order of the grid"""

    grid: Grid
    cells: tuple[Cell, ...]
    entries: Mapping[str, Entry]
    lines: tuple[Line, ...]

    @property
    def seeds(self) -> list[int]:
        """Those of the finished cells."""
        return sorted({cell.seed for cell in self.cells if cell.fingerprint in self.entries})

    @property
    def recipes(self) -> list[str]:
        return list(dict.fromkeys(line.recipe for line in self.lines))

    @property
    def axes(self) -> list[str]:
        return [axis.name for axis in self.grid.axes if axis.name != RECIPE]

    def of(self, recipe: str) -> list[Line]:
        return [line for line in self.lines if line.recipe == recipe]

    def metrics(self, recipe: str) -> list[Metric]:
        """What the networks of a recipe are judged by: the average of its tasks, and among all labels."""
        lines = self.of(recipe)
        return [metric for metric in ("average", "joint") if any(line.values(metric) for line in lines)]

    def tasks(self, recipe: str) -> list[str]:
        found = (task for line in self.of(recipe) for row in line.rows.values() for task in row["tasks"])
        return list(dict.fromkeys(found))

    def points(self, recipe: str) -> list[str]:
        """Budgets in the order of their size."""
        found = {line.point: _value(line) for line in self.of(recipe) if line.point}
        return sorted(found, key=lambda point: (point.split()[0], found[point]))

    def judged(self, recipe: str) -> list[Line]:
        """The networks that stand against each other; where the grid has axes, without the baselines of every cell."""
        left_out = (*REFERENCES, "baseline", "comparator") if self.axes else REFERENCES
        return [line for line in self.of(recipe) if line.kind not in left_out]

    def compared(self, recipe: str, point: str) -> list[Line]:
        """Those of one point, and those without a budget that cost as much."""
        lines = self.judged(recipe)
        cheapest = any(line.point == point and line.cheapest for line in lines)
        return [
            line for line in lines if line.point == point or (not line.point and cheapest and line.cheapest)
        ]

    def ranking(self, recipe: str, point: str, metric: Metric) -> list[Place]:
        """The best first; networks that chance may have put in this order share a rank."""
        lines = [line for line in self.compared(recipe, point) if line.values(metric)]
        places = [Place(1 + sum(better(other, line, metric) for other in lines), line) for line in lines]
        return sorted(
            places, key=lambda place: (place.rank, -statistics.mean(place.line.values(metric).values()))
        )

    def foretold(self, recipe: str, point: str, metric: Metric) -> dict[str, float]:
        """Spearman's correlation of what is known without any label with the metric, over the settings of a point.

        Only what differs between four settings or more is told.
        """
        lines = [
            line for line in self.compared(recipe, point) if line.kind == "merged" and line.values(metric)
        ]
        names = dict.fromkeys(name for line in lines for row in line.rows.values() for name in row["scores"])
        found = {}
        for name in ("predicted", *names):
            pairs = [(line.score(name), statistics.mean(line.values(metric).values())) for line in lines]
            known = [(score, value) for score, value in pairs if score is not None]
            if len({score for score, _ in known}) >= 4 and len({value for _, value in known}) > 1:
                result: Any = spearmanr([score for score, _ in known], [value for _, value in known])
                found[name] = float(result.statistic)
        return found


def find(grid: Grid, cells: Sequence[Cell], entries: Mapping[str, Entry]) -> Findings:
    """Put the rows of the finished cells together over seeds. entries: by fingerprint"""
    found: dict[tuple[Any, ...], dict[int, Mapping[str, Any]]] = {}
    told: dict[tuple[Any, ...], Mapping[str, str]] = {}
    for cell in as_listed(grid, cells):
        if cell.fingerprint not in entries:
            continue
        entry = entries[cell.fingerprint]
        labels = {axis: label for axis, label in cell.labels.items() if axis != RECIPE}
        setting = (cell.labels.get(RECIPE, ""), *labels.values())
        told[setting] = labels
        for row in entry.rows:
            key = (setting, row["kind"], row["network"], point_of(row))
            found.setdefault(key, {})[cell.seed] = {**row, "seconds": entry.seconds, "scores": entry.scores}
    lines = [
        Line(setting[0], told[setting], kind, network, point, rows)
        for (setting, kind, network, point), rows in found.items()
    ]
    return Findings(grid, tuple(cells), entries, tuple(lines))


def as_listed(grid: Grid, cells: Sequence[Cell]) -> list[Cell]:
    """The cells in the order of the grid: its recipes, the values of its axes, the seeds."""
    numbers = {
        axis.name: {value.label: number for number, value in enumerate(axis.values)} for axis in grid.axes
    }
    return sorted(
        cells, key=lambda cell: (*(numbers[axis][cell.labels[axis]] for axis in numbers), cell.seed)
    )


def point_of(row: Mapping[str, Any]) -> str:
    point = row["point"]
    return "" if point is None else f"{point['kind']} {point['value']:g}"


def _value(line: Line) -> float:
    return next(iter(line.rows.values()))["point"]["value"]


def better(one: Line, other: Line, metric: Metric) -> bool:
    """Whether `one` is better than `other` beyond chance: paired by seed, two-sided, at 95 %.

    With one seed nothing is known of chance: better is what is better by a tenth of a per cent, as it is printed.
    """
    first, second = one.values(metric), other.values(metric)
    gaps = [first[seed] - second[seed] for seed in first if seed in second]
    if len(gaps) < 2:
        means = [round(100 * statistics.mean(values.values()), 1) for values in (first, second)]
        return means[0] > means[1]
    margin = student.ppf((1 + CONFIDENCE) / 2, len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return statistics.mean(gaps) > max(float(margin), 5e-4)
