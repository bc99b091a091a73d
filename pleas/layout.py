"""Where units stand in the merged network: the layout of every widened axis.

A class of `n` units of which `m` are kept apart becomes `n + m` merged units, ordered `[A-only | fused |
B-only]`, so that what A-only units may read, `[A-only | fused]`, and what B-only units may read, `[fused |
B-only]`, are contiguous slices. An axis may hold several classes, each unit at several positions (a flattened
map), or positions of different classes in turn (a channel shuffle). One rule covers all: every place of the
axis grows in place. The first `m` places of a class hold two merged units each, the others one, and a run of
neighbouring positions of one unit is repeated for each of its merged units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pleas.errors import UnsupportedModel
from pleas.symmetry import DimUnits

FUSED, A_ONLY, B_ONLY = 0, 1, 2


@dataclass(frozen=True)
class ClassPlan:
    """Which units of a class are fused and which are kept apart, as units of A (B is aligned to A).

    heads: for output classes with one head per parent, the number of outputs of A and B; then nothing is
        fused.
    """

    fused: Tensor
    apart: Tensor
    heads: tuple[int, int] | None = None

    @property
    def width(self) -> int:
        """Units of the merged network."""
        return sum(self.heads) if self.heads else len(self.fused) + 2 * len(self.apart)

    @property
    def share_apart(self) -> float:
        return 1.0 if self.heads else len(self.apart) / max(1, len(self.fused) + len(self.apart))

    @cached_property
    def merged(self) -> tuple[Tensor, Tensor]:
        """(kind, unit) of every merged unit in order: A-only, fused, B-only."""
        if self.heads:
            units = torch.cat([torch.arange(self.heads[0]), torch.arange(self.heads[1])])
            kinds = torch.tensor([A_ONLY] * self.heads[0] + [B_ONLY] * self.heads[1])
            return kinds, units
        kinds = torch.cat(
            [
                torch.full_like(self.apart, A_ONLY),
                torch.full_like(self.fused, FUSED),
                torch.full_like(self.apart, B_ONLY),
            ]
        )
        return kinds, torch.cat([self.apart, self.fused, self.apart])


@dataclass(frozen=True)
class Layout:
    """One axis of the merged network: for every merged position its kind and the parents' position it stands
    for.

    kind:   (size,) FUSED, A_ONLY or B_ONLY
    source: (size,) position on the parents' axis (A's own; B's after alignment)
    old:    size of the parents' axis
    start:  (old + 1,) merged positions that come before each old position: a slice [i, j) becomes [start[i],
        start[j])
    split:  (old,) True where a slice may not begin: inside a run that grew
    """

    kind: Tensor
    source: Tensor
    old: int
    start: Tensor = field(repr=False)
    split: Tensor = field(repr=False)

    @property
    def size(self) -> int:
        return len(self.kind)

    @cached_property
    def widened(self) -> bool:
        return bool((self.kind != FUSED).any())

    def positions(self, *kinds: int) -> Tensor:
        """Merged positions of the given kinds, ascending."""
        return torch.isin(self.kind, torch.tensor(kinds)).nonzero()[:, 0]


def plain_layout(size: int) -> Layout:
    """An axis that does not grow."""
    return Layout(
        torch.zeros(size, dtype=torch.int64),
        torch.arange(size),
        size,
        torch.arange(size + 1),
        torch.zeros(size, dtype=torch.bool),
    )


def lay_out(units: DimUnits, plans: Mapping[int, ClassPlan]) -> Layout:
    """The layout of an axis whose positions carry `units` when class `c` follows `plans[c]`."""
    cls, unit = units.cls, units.unit
    size = len(cls)
    present = [c for c in cls.unique().tolist() if c >= 0 and c in plans]
    if not any(plans[c].share_apart > 0 for c in present):
        return plain_layout(size)
    if any(plans[c].heads for c in present):
        return _heads_layout(units, plans, present)
    occurrence = _occurrences(cls, unit)
    sources = {c: _sources(cls, unit, occurrence, c) for c in present}
    kinds: list[Tensor] = []
    source: list[Tensor] = []
    start = torch.zeros(size + 1, dtype=torch.int64)
    split = torch.zeros(size, dtype=torch.bool)
    for first, last in _runs(cls, unit):
        c = int(cls[first])
        if c not in plans:
            emitted = [(FUSED, torch.arange(first, last))]
        else:
            plan = plans[c]
            kind_of, unit_of = plan.merged
            doubled = len(plan.apart)
            place = int(unit[first])
            slots = (2 * place, 2 * place + 1) if place < doubled else (doubled + place,)
            wanted = occurrence[first:last]
            emitted = [(int(kind_of[s]), sources[c][unit_of[s], wanted]) for s in slots]
        grown = sum(len(positions) for _, positions in emitted)
        start[first + 1 : last + 1] = int(start[first]) + torch.arange(1, last - first + 1)
        start[last] = int(start[first]) + grown
        split[first + 1 : last] = len(emitted) > 1
        for kind, positions in emitted:
            kinds.append(torch.full((len(positions),), kind))
            source.append(positions)
    return Layout(torch.cat(kinds), torch.cat(source), size, start, split)


def _heads_layout(units: DimUnits, plans: Mapping[int, ClassPlan], present: list[int]) -> Layout:
    """One output axis with a head per parent: A's outputs, then B's."""
    if len(present) != 1 or bool((units.cls != present[0]).any()):
        raise UnsupportedModel(
            "separate heads need a model whose output axis is the outputs of one layer; here it mixes "
            f"{len(present)} classes. Use labels: shared, or a model with a single linear head."
        )
    kind, source = plans[present[0]].merged
    size = len(units.cls)
    start = torch.zeros(size + 1, dtype=torch.int64)
    start[size] = len(kind)
    split = torch.ones(size, dtype=torch.bool)
    split[0] = False
    return Layout(kind, source, size, start, split)


def _occurrences(cls: Tensor, unit: Tensor) -> Tensor:
    """For every position, how many positions of the same unit come before it."""
    key = cls * (int(unit.max()) + 2) + unit
    order = torch.argsort(key, stable=True)
    ordered = key[order]
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[1:] = ordered[1:] != ordered[:-1]
    index = torch.arange(len(key))
    begin = torch.where(fresh, index, 0).cummax(0).values
    out = torch.empty_like(key)
    out[order] = index - begin
    return out


def _sources(cls: Tensor, unit: Tensor, occurrence: Tensor, c: int) -> Tensor:
    """(units, occurrences) -> position on the axis."""
    here = (cls == c).nonzero()[:, 0]
    table = torch.full((int(unit[here].max()) + 1, int(occurrence[here].max()) + 1), -1)
    table[unit[here], occurrence[here]] = here
    return table


def _runs(cls: Tensor, unit: Tensor) -> list[tuple[int, int]]:
    """Maximal runs [first, last) of neighbouring positions of one unit; fixed positions are runs of their
    own."""
    same = (cls[1:] == cls[:-1]) & (unit[1:] == unit[:-1]) & (cls[1:] >= 0)
    begin = torch.cat([torch.zeros(1, dtype=torch.int64), (~same).nonzero()[:, 0] + 1])
    return list(zip(begin.tolist(), [*begin[1:].tolist(), len(cls)], strict=True))
