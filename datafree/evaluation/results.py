"""What a merge is judged by: one row per network, every row measured by the same functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import pleas
from datafree.evaluation.evaluate import Evaluation

Kind = Literal["parent", "ensemble", "baseline", "comparator", "merged", "refined", "oracle"]


@dataclass(frozen=True)
class Point:
    """One merged model asked for: a budget of multiply-adds, or a fraction of units kept apart."""

    kind: Literal["budget", "apart"]
    value: float

    @property
    def label(self) -> str:
        return f"{self.kind} {self.value:g}"

    @property
    def folder(self) -> str:
        return f"{self.kind}-{self.value:g}"


@dataclass(frozen=True)
class Row:
    """One network: what it costs and how good it is.

    kind:  what it is: merged is by least squares, the oracle is merged from real images; a baseline is a plain
           average, a comparator another method that makes one network
    name:  which parent, or which baseline or method; "" where there is but one of the kind
    flops: floating-point operations for one image, as FlopCounterMode counts them (2 per multiply-add)
    ratio: flops relative to one parent
    note:  what a reader must know to compare the row, "" where nothing
    predicted: squared error of the outputs on held-out proxies, relative to the variance of what they should be
    """

    kind: Kind
    name: str
    flops: int
    ratio: float
    parameters: int
    evaluation: Evaluation
    point: Point | None = None
    note: str = ""
    predicted: float | None = None

    @property
    def title(self) -> str:
        """ "parent a", "ensemble", "plain average", "merged"."""
        if self.kind in ("baseline", "comparator"):
            return self.name
        return f"{self.kind} {self.name}".rstrip()

    @property
    def label(self) -> str:
        return self.title if self.point is None else f"{self.title}, {self.point.label}"

    def to_dict(self) -> dict[str, Any]:
        point = None if self.point is None else {"kind": self.point.kind, "value": self.point.value}
        return {
            "kind": self.kind,
            "name": self.title,
            "point": point,
            "flops": self.flops,
            "ratio": self.ratio,
            "parameters": self.parameters,
            "note": self.note,
            "predicted": self.predicted,
            **self.evaluation.to_dict(),
        }


@dataclass(frozen=True)
class Results:
    """All rows of a run and the evidence behind the merged ones.

    layers: per point, the predicted relative residual of every layer
    plans:  per point, predicted error, cost and the table of `artefact.plan_table`
    """

    name: str
    fingerprint: str
    labels: Literal["shared", "separate"]
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    layers: Mapping[Point, tuple[pleas.LayerEvidence, ...]]
    plans: Mapping[Point, Mapping[str, Any]]
    notes: tuple[str, ...]

    def of_kind(self, kind: Kind) -> list[Row]:
        return [row for row in self.rows if row.kind == kind]

    @property
    def joint(self) -> bool:
        """Whether any row has an accuracy among the labels of all heads."""
        return any(row.evaluation.joint is not None for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """`metrics.json`: numbers only, the same bytes for the same recipe on the same machine."""
        return {
            "datafree": version("datafree"),
            "name": self.name,
            "recipe": self.fingerprint,
            "labels": self.labels,
            "rows": [row.to_dict() for row in self.rows],
            "layers": {
                point.label: [
                    {
                        "layer": layer.name,
                        "residual": layer.residual,
                        "rows": layer.rows,
                        "dead": len(layer.dead),
                    }
                    for layer in layers
                ]
                for point, layers in self.layers.items()
            },
            "plans": {point.label: dict(plan) for point, plan in self.plans.items()},
            "notes": list(self.notes),
        }


def row_values(row: Row, tasks: Sequence[str]) -> dict[str, Any]:
    """A row as flat values for a table of numbers; None where the network has no answer."""
    scores = {task: row.evaluation.score(task) for task in tasks}
    return {
        "network": row.label,
        "kind": row.kind,
        "point": None if row.point is None else row.point.value,
        **{task: None if found is None else found.accuracy for task, found in scores.items()},
        "average": row.evaluation.average if len(row.evaluation.tasks) == len(tasks) else None,
        "joint": row.evaluation.joint,
        "predicted": row.predicted,
        "flops": row.flops,
        "ratio": row.ratio,
        "parameters": row.parameters,
    }


def columns(results: Results) -> list[str]:
    """Headings of the table that `cells` fills."""
    accuracies = [
        *results.tasks,
        *(["average"] if len(results.tasks) > 1 else []),
        *(["joint"] if results.joint else []),
    ]
    return ["network", *accuracies, "predicted", "FLOPs", "ratio", "parameters"]


def cells(results: Results, row: Row) -> list[str]:
    """One row of the table as text; a dash where the network has no answer."""
    scores = [row.evaluation.score(task) for task in results.tasks]
    accuracies = [None if score is None else score.accuracy for score in scores]
    if len(results.tasks) > 1:
        accuracies.append(average_of(results, row))
    if results.joint:
        accuracies.append(row.evaluation.joint)
    shown = ["-" if value is None else f"{100 * value:.1f}" for value in accuracies]
    predicted = "-" if row.predicted is None else f"{row.predicted:.3f}"
    return [row.label, *shown, predicted, _si(row.flops), f"{row.ratio:.3f}", _si(row.parameters)]


def average_of(results: Results, row: Row) -> float | None:
    """Mean accuracy over all tasks; None for a parent that answers only its own: it compares with nothing."""
    return row.evaluation.average if len(row.evaluation.tasks) == len(results.tasks) else None


def _si(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 100 * size else f"{value / size:.0f} {unit}"
    return f"{value:g}"
