"""Where units stand in the merged network: the layout of every widened axis.

A merged unit is a set of owners, the parents whose unit it stands for, written as a bit mask: bit `p` for parent `p`,
all bits for a unit that every parent shares. A class of `n` units per parent becomes the units of its `ClassPlan`,
ordered by the mean number of their owners: of two parents `[A's own | fused | B's own]`, so that what a unit of A may
read is a contiguous slice.

An axis may hold several classes, each unit at several positions (a flattened map), or positions of different classes in
turn (a channel shuffle). One rule covers all: every place of the axis grows in place. The merged units of a class are
dealt to its places as evenly as they go, and a run of neighbouring positions of one unit is repeated for each merged
unit of its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pleas.errors import UnsupportedModel
from pleas.symmetry import DimUnits


def everyone(parents: int) -> int:
    """The mask of a unit that all parents share."""
    return (1 << parents) - 1


def owners(mask: int) -> list[int]:
    """The parents of a mask, ascending."""
    return [p for p in range(mask.bit_length()) if mask >> p & 1]


def place_of_mask(mask: int) -> tuple[float, int]:
    """Sorts masks: by the mean number of the owners, then by the mask."""
    held = owners(mask)
    return sum(held) / len(held), mask


def popcount(masks: Tensor) -> Tensor:
    """Owners per mask."""
    return sum((masks >> p & 1 for p in range(int(masks.max()).bit_length())), torch.zeros_like(masks))


@dataclass(frozen=True)
class ClassPlan:
    """The merged units of a class, in order.

    masks:   (m,) owners of every merged unit
    sources: (parents, m) the unit of each parent that it stands for, in the common order; any number where the
             parent is no owner
    parts:   sizes of the heads, where an output class is several heads side by side; () otherwise
    """

    masks: Tensor
    sources: Tensor
    size: int
    parts: tuple[int, ...] = ()

    @classmethod
    def of(cls, partitions: Sequence[Sequence[int]], parents: int) -> ClassPlan:
        """From the masks of every unit: [3] is fused by two parents, [1, 2] kept apart."""
        flat = [(mask, unit) for unit, masks in enumerate(partitions) for mask in masks]
        flat.sort(key=lambda one: (place_of_mask(one[0]), one[1]))
        masks = torch.tensor([mask for mask, _ in flat], dtype=torch.int64)
        units = torch.tensor([unit for _, unit in flat], dtype=torch.int64)
        return cls(masks, units.expand(parents, -1).clone(), len(partitions))

    @property
    def parents(self) -> int:
        return len(self.sources)

    @property
    def width(self) -> int:
        """Units of the merged network."""
        return len(self.masks)

    @cached_property
    def widened(self) -> bool:
        """Whether any unit is not everybody's."""
        return bool((self.masks != everyone(self.parents)).any())

    @property
    def share_apart(self) -> float:
        """Of the most units there could be beyond those of one parent, those that there are."""
        most = (self.parents - 1) * self.size
        return 1.0 if self.parts else (self.width - self.size) / max(1, most)


@dataclass(frozen=True)
class Layout:
    """One axis of the merged network: for every merged position its owners and the parents' positions it stands for.

    masks:   (size,) owners
    sources: (parents, size) position on each parent's axis, in the common order
    old:     size of the parents' axis
    start:   (old + 1,) merged positions that come before each old position: a slice [i, j) becomes [start[i], start[j])
    split:   (old,) True where a slice may not begin: inside a run that grew
    """

    masks: Tensor
    sources: Tensor
    old: int
    start: Tensor = field(repr=False)
    split: Tensor = field(repr=False)

    @property
    def parents(self) -> int:
        return len(self.sources)

    @property
    def size(self) -> int:
        return len(self.masks)

    @cached_property
    def widened(self) -> bool:
        return bool((self.masks != everyone(self.parents)).any())

    @cached_property
    def plain(self) -> bool:
        """Whether the axis is the parents' own."""
        return not self.widened and bool((self.sources == torch.arange(self.old)).all())

    def positions(self, mask: int) -> Tensor:
        """Merged positions with exactly these owners, ascending."""
        return (self.masks == mask).nonzero()[:, 0]

    def readable(self, mask: int) -> Tensor:
        """Merged positions that share an owner with `mask`, ascending: what such a row may read."""
        return (self.masks & mask).nonzero()[:, 0]

    def present(self) -> list[int]:
        """The masks that occur, in the order of the axis."""
        return sorted(self.masks.unique().tolist(), key=place_of_mask)

    def mixing(self, parent: int) -> Tensor:
        """(size,) float64: the share of this parent's unit in every merged unit, one over its owners."""
        return (self.masks >> parent & 1).double() / popcount(self.masks)


def plain_layout(size: int, parents: int) -> Layout:
    """An axis that does not grow."""
    return Layout(
        torch.full((size,), everyone(parents)),
        torch.arange(size).expand(parents, -1),
        size,
        torch.arange(size + 1),
        torch.zeros(size, dtype=torch.bool),
    )


def lay_out(units: DimUnits, plans: Mapping[int, ClassPlan], parents: int) -> Layout:
    """The layout of an axis whose positions carry `units` when class `c` follows `plans[c]`."""
    cls, unit = units.cls, units.unit
    size = len(cls)
    present = [c for c in cls.unique().tolist() if c >= 0 and c in plans]
    if not any(plans[c].widened or plans[c].parts for c in present):
        return plain_layout(size, parents)
    if any(plans[c].parts for c in present):
        return _outputs_layout(units, plans, present)
    occurrence = _occurrences(cls, unit)
    sources = {c: _sources(cls, unit, occurrence, c) for c in present}
    masks: list[Tensor] = []
    source: list[Tensor] = []
    start = torch.zeros(size + 1, dtype=torch.int64)
    split = torch.zeros(size, dtype=torch.bool)
    for first, last in _runs(cls, unit):
        c = int(cls[first])
        if c not in plans:
            emitted = [(everyone(parents), torch.arange(first, last).expand(parents, -1))]
        else:
            plan = plans[c]
            wanted = occurrence[first:last]
            emitted = [
                (int(plan.masks[slot]), sources[c][plan.sources[:, slot]][:, wanted])
                for slot in _slots(plan, int(unit[first]))
            ]
        grown = sum(positions.shape[1] for _, positions in emitted)
        start[first + 1 : last + 1] = int(start[first]) + torch.arange(1, last - first + 1)
        start[last] = int(start[first]) + grown
        split[first + 1 : last] = len(emitted) > 1
        for mask, positions in emitted:
            masks.append(torch.full((positions.shape[1],), mask))
            source.append(positions)
    return Layout(torch.cat(masks), torch.cat(source, 1), size, start, split)


def _slots(plan: ClassPlan, place: int) -> range:
    """The merged units that stand in a place of the class: as many in each as they go, the first have one more."""
    each, more = divmod(plan.width, plan.size)
    first = place * each + min(place, more)
    return range(first, first + each + (place < more))


def _outputs_layout(units: DimUnits, plans: Mapping[int, ClassPlan], present: list[int]) -> Layout:
    """The output axis where parents do not have the same outputs: heads side by side, or a union of labels."""
    if len(present) != 1 or bool((units.cls != present[0]).any()):
        raise UnsupportedModel(
            "separate heads need a model whose output axis is the outputs of one layer; here it mixes "
            f"{len(present)} classes. Use labels: shared, or a model with a single linear head."
        )
    plan = plans[present[0]]
    size = len(units.cls)
    start = torch.zeros(size + 1, dtype=torch.int64)
    start[size] = plan.width
    split = torch.ones(size, dtype=torch.bool)
    split[0] = False
    return Layout(plan.masks, plan.sources, size, start, split)


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
