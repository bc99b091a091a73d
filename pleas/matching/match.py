"""Which unit of one parent plays the part of which unit of another: similarities of units, then linear assignment."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pleas.matching.activations import activation_similarities
from pleas.matching.assign import AxisName, Similarities, assign, leave
from pleas.matching.weights import match_weights
from pleas.parents import Parents
from pleas.statistics.collect import Statistics
from pleas.symmetry import (
    Permutation,
    Symmetry,
    UnitClass,
    UnitPermutation,
    compose,
    identity,
    inverse,
    permute_state,
    position_maps,
)

SWEEPS = 20  # of the alternation between three parents or more, at most
CHANCE = (
    2.0  # standard errors of a correlation by which another place has to be better, where there is a base
)


def match(parents: Parents, statistics: Statistics | None) -> tuple[Permutation, ...]:
    """For every parent the permutation of its units that lines them up with the first parent's, class by class.

    Activation matching maximises the correlation of units, summed over every layer that reads or writes the
    class and over all pairs of parents. Weight matching needs no statistics. Output units are never permuted: their
    order is the label order.

    Parents with a common base are in one order to begin with. Their units stay where they are, unless another place
    raises the similarity by more than chance does (CHANCE / sqrt(images) for each correlation of a unit that moves);
    weight matching ascends from there, where chance has no part. `units_moved` says how many do not stay.
    """
    if parents.settings.matching == "weight":
        return common_order(parents, _WeightPairs(parents))
    assert statistics is not None
    return common_order(parents, ActivationPairs.of(parents, statistics))


class Pairs(Protocol):
    """A way of assigning the units of one parent to those of others."""

    def assign(self, p: int, q: int) -> tuple[Permutation, float]:
        """The units of q that play the parts of p's, and the total similarity."""
        ...

    def reassign(self, q: int, others: Mapping[int, Permutation]) -> tuple[Permutation, float]:
        """The units of q against the sum of all others, which are in the common order."""
        ...


class ActivationPairs:
    """Assignments of one parent to another from similarities that depend on nothing that is matched.

    blocks: (p, q), p < q -> every position of p against every position of q, by axis
    stay:   what is added to the similarity of a unit's own place
    """

    def __init__(
        self, symmetry: Symmetry, blocks: Mapping[tuple[int, int], Similarities], stay: float = 0.0
    ) -> None:
        self.symmetry, self._blocks, self._stay = symmetry, blocks, stay

    @classmethod
    def of(cls, parents: Parents, statistics: Statistics) -> ActivationPairs:
        """From the correlations of units."""
        pairs = itertools.combinations(range(parents.count), 2)
        blocks = {pair: activation_similarities(statistics, parents.count, *pair) for pair in pairs}
        stay = 0.0 if parents.base is None else CHANCE / math.sqrt(max(statistics.images, 1))
        return cls(parents.symmetry, blocks, stay)

    def similarities(self, p: int, q: int) -> Similarities:
        """Every position of p against every position of q."""
        if p < q:
            return self._blocks[p, q]
        return {axis: block.T for axis, block in self._blocks[q, p].items()}

    def assign(self, p: int, q: int) -> tuple[Permutation, float]:
        """The units of q that play the parts of p's, and the total similarity."""
        return self._assign(self.similarities(p, q))

    def reassign(self, q: int, others: Mapping[int, Permutation]) -> tuple[Permutation, float]:
        """The units of q against the sum of all others, which are in the common order."""
        total: dict[AxisName, Tensor] = {}
        for p, permutation in others.items():
            maps = position_maps(self.symmetry, permutation)
            for axis, block in self.similarities(p, q).items():
                aligned = block.index_select(0, maps[axis]) if axis in maps else block
                total[axis] = total[axis] + aligned if axis in total else aligned
        return self._assign(total, len(others))

    def _assign(self, similarities: Similarities, others: int = 1) -> tuple[Permutation, float]:
        if self._stay:  # an exact assignment still, of similarities that favour a unit's own place
            similarities = {
                axis: block + others * self._stay * torch.eye(*block.shape, dtype=block.dtype)
                for axis, block in similarities.items()
            }
        chosen, value = [], 0.0
        for index, unit_class in enumerate(self.symmetry.classes):
            if index in self.symmetry.output:
                chosen.append(leave(unit_class))
                continue
            best, found = assign(unit_class, similarities)
            chosen.append(best)
            value += found
        return tuple(chosen), value


class _WeightPairs:
    """The same from the weights alone."""

    def __init__(self, parents: Parents) -> None:
        self.symmetry, self._states = parents.symmetry, parents.states
        self._start = None if parents.base is None else identity(parents.symmetry)

    def assign(self, p: int, q: int) -> tuple[Permutation, float]:
        return match_weights(self.symmetry, self._states[p], self._states[q], start=self._start)

    def reassign(self, q: int, others: Mapping[int, Permutation]) -> tuple[Permutation, float]:
        aligned = [permute_state(self.symmetry, self._states[p], chosen) for p, chosen in others.items()]
        total = {name: summed([state[name] for state in aligned]) for name in aligned[0]}
        return match_weights(self.symmetry, total, self._states[q], start=self._start)


def summed(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of those of one shape: heads of other label sets do not add up."""
    same = [x for x in tensors if x.shape == tensors[0].shape]
    return sum(same[1:], same[0]) if same[0].is_floating_point() else same[0]


def common_order(parents: Parents, pairs: Pairs) -> tuple[Permutation, ...]:
    """Two parents are assigned once. More: everybody to the parent that resembles the others most, then each in turn to
    the sum of all others until the total stops rising (as MergeMany of arXiv 2209.04836); from the order they are in
    where they have a common base. All are in one order at every moment: consistent around every cycle.
    """
    symmetry, count = parents.symmetry, parents.count
    if count == 2:
        return identity(symmetry), pairs.assign(0, 1)[0]
    order, chosen = list(range(count)), [identity(symmetry)] * count
    if parents.base is None:
        found = {(p, q): pairs.assign(p, q) for p, q in itertools.permutations(range(count), 2)}
        likeness = [sum(found[p, q][1] for q in range(count) if q != p) for p in range(count)]
        # By likeness, not by number: the order in which parents are given does not matter.
        order.sort(key=lambda p: -likeness[p])
        chosen = [chosen[q] if q == order[0] else found[order[0], q][0] for q in range(count)]
    before = float("-inf")
    for _ in range(SWEEPS):
        total = 0.0
        for q in order:
            chosen[q], value = pairs.reassign(q, {p: chosen[p] for p in range(count) if p != q})
            total += value
        if total <= before + 1e-9 * abs(total):
            break
        before = total
    back = inverse(chosen[0])  # into the first parent's own order
    return tuple(compose(back, permutation) for permutation in chosen)


def units_moved(parents: Parents, alignments: Sequence[Permutation]) -> tuple[str, ...]:
    """For parents with a common base, one sentence: how often a permutation helps although they began in one order."""
    if parents.base is None:
        return ()
    symmetry, said, moved, units = parents.symmetry, [], 0, 0
    for name, alignment in zip(parents.names[1:], alignments[1:], strict=True):
        for index, (unit_class, chosen) in enumerate(zip(symmetry.classes, alignment, strict=True)):
            if index in symmetry.output:
                continue
            away, size = _count_moved(unit_class, chosen)
            moved, units = moved + away, units + size
            if away:
                said.append((away, f"{unit_class.name} of {name}: {away} of {size}"))
    if not moved:
        return (f"a common base: all {units:,} units are best where they are, and none was permuted",)
    said.sort(key=lambda item: -item[0])
    shown = "; ".join(text for _, text in said[:3]) + ("; ..." if len(said) > 3 else "")
    return (
        f"a common base: {units - moved:,} of {units:,} units stay where they are, a permutation helps for {moved:,} "
        f"in {len(said)} classes ({shown})",
    )


def _count_moved(unit_class: UnitClass, chosen: UnitPermutation) -> tuple[int, int]:
    """Units, inner ones too, that do not stay in place, and all of them."""
    away, size = int((chosen.perm != torch.arange(len(chosen.perm))).sum()), unit_class.size
    for place, inner in enumerate(chosen.children):
        for child, part in zip(unit_class.children[place], inner, strict=True):
            counted = _count_moved(child, part)
            away, size = away + counted[0], size + counted[1]
    return away, size
