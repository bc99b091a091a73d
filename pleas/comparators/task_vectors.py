"""Arithmetic of task vectors, entry by entry: sums, and sums of what is left after trimming."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pleas.comparators.comparator import Case, State
from pleas.comparators.one_size import Canvas, OneSize, Ranges, check_range, in_order
from pleas.comparators.vectors import FromBase, Tasks, Vectors, each, largest, total, whole
from pleas.evidence import Evidence

PARALLEL = 0.9995  # cosine above which slerp is linear


@dataclass(frozen=True)
class TaskArithmetic(FromBase):
    """base + scale * sum_p (W_p - base) (Task Arithmetic, arXiv 2212.04089, section 2).

    scale: of the sum of task vectors
    """

    title: ClassVar[str] = "task arithmetic"
    ranges: ClassVar[Ranges] = {"scale": (0, 10)}
    scale: float = 0.3

    def combine(self, tasks: Tasks) -> State:
        return total(tasks.vectors, self.scale)


@dataclass(frozen=True)
class Ties(FromBase):
    """The largest entries of task vectors, averaged over those of the elected sign (TIES, arXiv 2306.01708, alg. 1).

    keep:  share of a task vector's entries that is kept, over all its tensors
    scale: of the merged task vector
    """

    title: ClassVar[str] = "TIES"
    ranges: ClassVar[Ranges] = {"keep": (0, 1), "scale": (0, 10)}
    keep: float = 0.2
    scale: float = 1.0

    def combine(self, tasks: Tasks) -> State:
        return ties(tasks.vectors, self.keep, self.scale)


def ties(vectors: Vectors, keep: float, scale: float) -> dict[str, Tensor]:
    """Trim to the largest entries, elect signs, average the entries that have the elected sign."""

    def merge(flat: Tensor) -> Tensor:
        trimmed = flat * largest(flat, keep)
        sign = trimmed.sum(0).sign()
        sign = torch.where(sign == 0, sign.sum().sign(), sign)  # undecided: as most are
        agrees = torch.where(sign > 0, trimmed > 0, trimmed < 0)
        return scale * (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)

    return whole(vectors, merge)


@dataclass(frozen=True)
class Dare(FromBase):
    """Entries of task vectors dropped at random, the others enlarged, then summed (DARE, arXiv 2311.03099).

    drop:  chance of an entry to be dropped; the others are divided by 1 - drop
    scale: of the sum
    """

    title: ClassVar[str] = "DARE"
    ranges: ClassVar[Ranges] = {"drop": (0, 0.999), "scale": (0, 10)}
    drop: float = 0.5
    scale: float = 0.3

    def combine(self, tasks: Tasks) -> State:
        return dare(tasks.vectors, self.drop, self.scale, tasks.case.seed)


def dare(vectors: Vectors, drop: float, scale: float, seed: int) -> dict[str, Tensor]:
    """Every entry times 0, or 1 / (1 - drop), by a seeded draw; the scaled sum over parents."""
    generator = torch.Generator().manual_seed(seed)
    kept = [
        {
            name: value * (torch.rand(value.shape, generator=generator) >= drop) / (1 - drop)
            for name, value in vector.items()
        }
        for vector in vectors
    ]
    return total(kept, scale)


@dataclass(frozen=True)
class Breadcrumbs(FromBase):
    """Task vectors without their smallest and largest entries, summed (Model Breadcrumbs, arXiv 2312.06795).

    low, high: entries of a layer's tensor are kept whose magnitude ranks between these shares
    scale:     of the sum
    """

    title: ClassVar[str] = "Model Breadcrumbs"
    low: float = 0.85
    high: float = 0.993
    scale: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("low", self.low, 0, self.high)
        check_range("high", self.high, self.low, 1)
        check_range("scale", self.scale, 0, 10)

    def combine(self, tasks: Tasks) -> State:
        return breadcrumbs(tasks.vectors, self.low, self.high, self.scale)


def breadcrumbs(vectors: Vectors, low: float, high: float, scale: float) -> dict[str, Tensor]:
    """Of every tensor the entries of rank floor(low n) to floor(high n) - 1 by magnitude; the scaled sum."""

    def merge(values: Tensor) -> Tensor:
        flat = values.flatten(1)
        size = flat.shape[1]
        rank = flat.abs().argsort(dim=1, stable=True).argsort(dim=1, stable=True)
        kept = flat * ((rank >= int(low * size)) & (rank < int(high * size)))
        return scale * kept.sum(0).view(values.shape[1:])

    return each(vectors, merge)


@dataclass(frozen=True)
class Lines(FromBase):
    """The sum of task vectors, scaled more the deeper the layer (LiNeS, arXiv 2410.17146).

    layer l of L is scaled by first + rise * (l - 1) / (L - 1). Published for the blocks of transformers; here every
    layer is one.

    first: scale of the first layer; by default one over the number of parents, as published
    rise:  how much more the last layer is scaled; published as searched in [0, 1], of which this is the middle
    """

    title: ClassVar[str] = "LiNeS"
    first: float | None = None
    rise: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("first", 0.0 if self.first is None else self.first, 0, 10)
        check_range("rise", self.rise, -1, 10)

    def combine(self, tasks: Tasks) -> State:
        first = 1 / len(tasks.vectors) if self.first is None else self.first
        return lines(tasks.vectors, tasks.depth, first, self.rise)


def lines(vectors: Vectors, depth: Mapping[str, float], first: float, rise: float) -> dict[str, Tensor]:
    """The sum over parents, every tensor times `first + rise * depth`."""
    return {name: (first + rise * depth[name]) * value for name, value in total(vectors).items()}


@dataclass(frozen=True)
class Slerp(OneSize):
    """Two parents' tensors on the great circle between them (SLERP, Shoemake 1985, as mergekit applies it to weights).

    place: 0 the first parent, 1 the second
    """

    title: ClassVar[str] = "SLERP"
    most_parents: ClassVar[int | None] = 2
    ranges: ClassVar[Ranges] = {"place": (0, 1)}
    place: float = 0.5

    def align(self, case: Case) -> Evidence:
        return in_order(case.evidence, "none")

    def merge(self, canvas: Canvas, case: Case) -> State:
        first, second = canvas.evidence.states
        names = [n for n in canvas.evidence.parents.symmetry.program.parameters if n not in canvas.heads]
        return {
            name: slerp(first[name].double().cpu(), second[name].double().cpu(), self.place) for name in names
        }


def slerp(a: Tensor, b: Tensor, place: float) -> Tensor:
    """sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b, w the angle between them; linear where they are parallel."""
    norms = a.norm() * b.norm()
    cosine = float((a * b).sum() / norms) if float(norms) > 0 else 1.0
    if abs(cosine) > PARALLEL:
        return (1 - place) * a + place * b
    angle = torch.tensor(cosine, dtype=torch.float64).arccos()
    return (torch.sin((1 - place) * angle) * a + torch.sin(place * angle) * b) / torch.sin(angle)
