"""Which unit of one parent plays the part of which unit of another: similarities of units, then linear assignment."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from pleas.matching.activations import activation_similarities
from pleas.matching.assign import AxisName, Similarities, assign, leave
from pleas.matching.weights import match_weights
from pleas.parents import Parents
from pleas.statistics.collect import Statistics
from pleas.symmetry import (
    Permutation,
    Symmetry,
    compose,
    identity,
    inverse,
    permute_state,
    position_maps,
)

SWEEPS = 20  # of the alternation between three parents or more, at most


def match(parents: Parents, statistics: Statistics | None) -> tuple[Permutation, ...]:
    """For every parent the permutation of its units that lines them up with the first parent's, class by class.

    Activation matching maximises the correlation of units, summed over every layer that reads or writes the
    class and over all pairs of parents. Weight matching needs no statistics. Output units are never permuted: their
    order is the label order.
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
    """

    def __init__(self, symmetry: Symmetry, blocks: Mapping[tuple[int, int], Similarities]) -> None:
        self.symmetry, self._blocks = symmetry, blocks

    @classmethod
    def of(cls, parents: Parents, statistics: Statistics) -> ActivationPairs:
        """From the correlations of units."""
        pairs = itertools.combinations(range(parents.count), 2)
        blocks = {pair: activation_similarities(statistics, parents.count, *pair) for pair in pairs}
        return cls(parents.symmetry, blocks)

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
        return self._assign(total)

    def _assign(self, similarities: Similarities) -> tuple[Permutation, float]:
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

    def assign(self, p: int, q: int) -> tuple[Permutation, float]:
        return match_weights(self.symmetry, self._states[p], self._states[q])

    def reassign(self, q: int, others: Mapping[int, Permutation]) -> tuple[Permutation, float]:
        aligned = [permute_state(self.symmetry, self._states[p], chosen) for p, chosen in others.items()]
        total = {name: summed([state[name] for state in aligned]) for name in aligned[0]}
        return match_weights(self.symmetry, total, self._states[q])


def summed(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of those of one shape: heads of other label sets do not add up."""
    same = [x for x in tensors if x.shape == tensors[0].shape]
    return sum(same[1:], same[0]) if same[0].is_floating_point() else same[0]


def common_order(parents: Parents, pairs: Pairs) -> tuple[Permutation, ...]:
    """Two parents are assigned once. More: everybody to the parent that resembles the others most, then each in turn to
    the sum of all others until the total stops rising (as MergeMany of arXiv 2209.04836). All are in one order at every
    moment, so the matching is consistent around every cycle.
    """
    symmetry, count = parents.symmetry, parents.count
    if count == 2:
        return identity(symmetry), pairs.assign(0, 1)[0]
    found = {(p, q): pairs.assign(p, q) for p, q in itertools.permutations(range(count), 2)}
    likeness = [sum(found[p, q][1] for q in range(count) if q != p) for p in range(count)]
    # By likeness, not by number: the order in which parents are given does not matter.
    order = sorted(range(count), key=lambda p: -likeness[p])
    chosen = [identity(symmetry) if q == order[0] else found[order[0], q][0] for q in range(count)]
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
