"""What a merge is judged by: one row per network, every row measured by the same functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import pleas
from datafree.evaluation.evaluate import Evaluation, Labels
from datafree.evaluation.fidelity import Fidelity

SCHEMA = 2  # of metrics.json: see docs/metrics.md
_EACH = 3  # parents that have a column of their own for agreement
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
    fidelity: how close it is to its parents on held-out proxies; None where nobody looked
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
    fidelity: Fidelity | None = None

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
            "proxies": None if self.fidelity is None else self.fidelity.to_dict(),
            **self.evaluation.to_dict(),
        }


@dataclass(frozen=True)
class Verdict:
    """What a run's numbers say: the network to take, what it is worth, what to do next.

    row:      the network; None where there is none
    measure:  what it was judged by: mean accuracy of the tasks, or mean agreement with the parents on held-out proxies
    value, ensemble: its measure and the ensemble's, 0 to 1        images: held-out proxies behind an agreement
    proxies:  what the proxies look like to the parents, "good", "fair" or "poor", source by source
    steps:    what to do next, a sentence each, the most promising first; none where nothing is wanting
    """

    row: Row | None
    measure: Literal["accuracy", "agreement"]
    value: float
    ensemble: float
    images: int
    proxies: Mapping[str, str]
    sentence: str
    steps: tuple[str, ...]

    @property
    def share(self) -> float:
        """Of the ensemble's measure."""
        return self.value / self.ensemble if self.ensemble else 0.0

    @property
    def text(self) -> str:
        return " ".join(f"{part}." for part in (self.sentence, *self.steps))

    def to_dict(self) -> dict[str, Any]:
        return {
            "network": None if self.row is None else self.row.label,
            "measure": self.measure,
            "value": self.value,
            "ensemble": self.ensemble,
            "share": self.share,
            "proxies": dict(self.proxies),
            "text": self.text,
            "next": list(self.steps),
        }


@dataclass(frozen=True)
class Line:
    """The loss along the straight line from one parent to another.

    matched: whether the second one's units are in the first one's order
    at:      places on the line from 0 (the first) to 1
    losses:  negative log-likelihood there, mean of the tasks, in nats
    """

    parents: tuple[str, str]
    matched: bool
    at: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """The most by which the loss exceeds the straight line between its ends (Frankle et al., arXiv 1912.05671)."""
        first, last = self.losses[0], self.losses[-1]
        return max(loss - (1 - t) * first - t * last for t, loss in zip(self.at, self.losses, strict=True))

    def to_dict(self) -> dict[str, Any]:
        return {
            "parents": list(self.parents),
            "matched": self.matched,
            "at": list(self.at),
            "losses": list(self.losses),
            "barrier": self.barrier,
        }


@dataclass(frozen=True)
class Results:
    """All rows of a run and the evidence behind the merged ones.

    layers: per point, the predicted relative residual of every layer
    plans:  per point, predicted error, cost and the table of `artefact.plan_table`
    verdict: which network to take and what to do next; None where nobody asked
    barriers: the loss along the lines between parents, where the recipe asks
    """

    name: str
    fingerprint: str
    labels: Labels
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    layers: Mapping[Point, tuple[pleas.LayerEvidence, ...]]
    plans: Mapping[Point, Mapping[str, Any]]
    notes: tuple[str, ...]
    verdict: Verdict | None = None
    barriers: tuple[Line, ...] = ()

    def of_kind(self, kind: Kind) -> list[Row]:
        return [row for row in self.rows if row.kind == kind]

    @property
    def joint(self) -> bool:
        """Whether any row has an accuracy among the labels of all heads."""
        return any(row.evaluation.joint is not None for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """`metrics.json`: numbers only, the same bytes for the same recipe on the same machine."""
        return {
            "schema": SCHEMA,
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
            "barriers": [line.to_dict() for line in self.barriers],
            "verdict": None if self.verdict is None else self.verdict.to_dict(),
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
    return ["network", *accuracies, *_closeness_columns(results), "predicted", "FLOPs", "ratio", "parameters"]


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
    cost = [_si(row.flops), f"{row.ratio:.3f}", _si(row.parameters)]
    return [row.label, *shown, *_closeness_cells(results, row), predicted, *cost]


def legend(results: Results) -> str:
    """What the columns about held-out proxies say; "" where there are none."""
    images = next((row.fidelity.images for row in results.rows if row.fidelity), None)
    if images is None:
        return ""
    known = any(row.fidelity and row.fidelity.own is not None for row in results.rows)
    own = ", own: that the parent chooses whose image it is, by the fit of its batch norms" if known else ""
    return (
        f"agree: share of {images} held-out proxies on which a network chooses the class that this parent chooses, in "
        f"per cent{own}; KL: mean divergence of its predictions from the parents', in nats"
    )


def _closeness_columns(results: Results) -> list[str]:
    if not any(row.fidelity for row in results.rows):
        return []
    names = [row.name for row in results.of_kind("parent")]
    each = [f"agree {name}" for name in names] if len(names) <= _EACH else ["agree"]
    own = any(row.fidelity and row.fidelity.own is not None for row in results.rows)
    return [*each, *(["agree own"] if own else []), "KL"]


def _closeness_cells(results: Results, row: Row) -> list[str]:
    headings, close = _closeness_columns(results), row.fidelity
    names = [parent.name for parent in results.of_kind("parent")]
    if not headings or close is None:
        return ["-"] * len(headings)
    whole = len(close.agreement) == len(names)
    shares = [close.agreement.get(name) for name in names]
    if len(names) > _EACH:
        shares = [close.mean_agreement if whole else None]
    if "agree own" in headings:
        shares.append(close.own)
    shown = ["-" if share is None else f"{100 * share:.1f}" for share in shares]
    return [*shown, f"{close.mean_divergence:.3f}" if whole else "-"]


def average_of(results: Results, row: Row) -> float | None:
    """Mean accuracy over all tasks; None for a parent that answers only its own: it compares with nothing."""
    return row.evaluation.average if len(row.evaluation.tasks) == len(results.tasks) else None


def _si(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 100 * size else f"{value / size:.0f} {unit}"
    return f"{value:g}"
