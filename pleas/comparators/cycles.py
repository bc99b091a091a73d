"""C2M3: permutations of all parents into one universe of units, so that they agree around every cycle."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pleas.comparators.comparator import Case, State
from pleas.comparators.mixing import Places, along, free_classes, not_mixable
from pleas.comparators.one_size import Canvas, OneSize, check_choice, check_range
from pleas.evidence import Evidence
from pleas.matching.assign import best_assignment, leave
from pleas.matching.weights import match_weights
from pleas.parents import Parents
from pleas.symmetry import Permutation, Symmetry, UnitPermutation, compose, identity, inverse

Soft = dict[int, Tensor]  # class -> doubly stochastic (places, units) of one parent


@dataclass(frozen=True)
class C2M3(OneSize):
    """Weights matched for all parents at once, cycle-consistently, by Frank-Wolfe (C2M3, arXiv 2405.17897).

    Maximises sum_{p<q} <P_p W_p, P_q W_q> over permutations P_p of parent p into a universe of units, relaxed to doubly
    stochastic matrices; every step goes towards the permutations that the gradient likes best, as far as pays.

    start:      where it begins: at the "identity", as published, or with every parent "matched" to the first
    iterations: steps at most    tolerance: relative gain of a step below which it ends
    """

    title: ClassVar[str] = "C2M3"
    start: Literal["identity", "matched"] = "identity"
    iterations: int = 100
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("start", self.start, ("identity", "matched"))
        check_range("iterations", self.iterations, 1, 10**5)
        check_range("tolerance", self.tolerance, 0, 1)

    def obstacle(self, parents: Parents, *, base: bool = False) -> str | None:
        return super().obstacle(parents, base=base) or not_mixable(parents)

    def align(self, case: Case) -> Evidence:
        parents = case.evidence.parents
        symmetry, states = parents.symmetry, parents.states
        begin = [identity(symmetry)] * parents.count
        if self.start == "matched":
            begin[1:] = [match_weights(symmetry, states[0], state)[0] for state in states[1:]]
        alignments = match_in_cycles(symmetry, states, begin, self.iterations, self.tolerance)
        return replace(case.evidence, alignments=alignments)

    def merge(self, canvas: Canvas, case: Case) -> State:
        return {}


def match_in_cycles(
    symmetry: Symmetry,
    states: Sequence[State],
    begin: Sequence[Permutation],
    iterations: int,
    tolerance: float,
) -> tuple[Permutation, ...]:
    """Per parent the permutation into the first one's order of units. begin: where the steps start"""
    names = [
        name
        for name in symmetry.program.parameters
        if len({state[name].shape for state in states}) == 1 and states[0][name].is_floating_point()
    ]
    weights = [{name: state[name].double().cpu() for name in names} for state in states]
    free, places = free_classes(symmetry), Places(symmetry)
    soft: list[Soft] = [{c: _matrix(one[c].perm) for c in free} for one in begin]
    value = _agreement(places, weights, soft)
    for _ in range(iterations):
        wanted = _best_vertices(places, weights, soft)
        step = _best_step(places, weights, soft, wanted)
        moved = [_between(own, goal, step) for own, goal in zip(soft, wanted, strict=True)]
        reached = _agreement(places, weights, moved)
        if reached <= value + tolerance * abs(value):
            break
        soft, value = moved, reached
    chosen = [_permutation(symmetry, own) for own in soft]
    back = inverse(chosen[0])
    return tuple(compose(back, one) for one in chosen)


def _between(own: Soft, goal: Soft, step: float) -> Soft:
    return {c: torch.lerp(own[c], goal[c], step) for c in own}


def _moved(places: Places, name: str, value: Tensor, soft: Soft, but: int | None = None) -> Tensor:
    """A tensor with its units moved to their places, along all of its dimensions `but` one."""
    for dim in range(value.dim()):
        if dim != but:
            value = along(value, dim, places.matrix(name, dim, soft))
    return value


def _agreement(places: Places, weights: Sequence[Mapping[str, Tensor]], soft: Sequence[Soft]) -> float:
    """sum_{p<q} <P_p W_p, P_q W_q>"""
    total = 0.0
    for name in weights[0]:
        moved = [_moved(places, name, own[name], s) for own, s in zip(weights, soft, strict=True)]
        total += sum(float((x * y).sum()) for x, y in itertools.combinations(moved, 2))
    return total


def _best_vertices(
    places: Places, weights: Sequence[Mapping[str, Tensor]], soft: Sequence[Soft]
) -> list[Soft]:
    """The permutations with the greatest inner product with the gradient."""
    moved = [
        {name: _moved(places, name, value, s) for name, value in own.items()}
        for own, s in zip(weights, soft, strict=True)
    ]
    total = {name: torch.stack([own[name] for own in moved]).sum(0) for name in moved[0]}
    found: list[Soft] = []
    for p, (own, s) in enumerate(zip(weights, soft, strict=True)):
        gradient = {c: torch.zeros_like(matrix) for c, matrix in s.items()}
        for name, value in own.items():
            others = total[name] - moved[p][name]
            for dim in range(value.dim()):
                touched = places.on(name, dim)
                if not touched:
                    continue
                left = others.movedim(dim, 0).reshape(value.shape[dim], -1)
                right = _moved(places, name, value, s, but=dim).movedim(dim, 0)
                right = right.reshape(value.shape[dim], -1)
                for c, axis in touched:
                    for units in axis.index.T:
                        gradient[c] += left[units] @ right[units].T
        found.append({c: _matrix(best_assignment(g)) for c, g in gradient.items()})
    return found


def _matrix(perm: Tensor) -> Tensor:
    return torch.eye(len(perm), dtype=torch.float64)[perm]


def _best_step(
    places: Places, weights: Sequence[Mapping[str, Tensor]], soft: Sequence[Soft], goal: Sequence[Soft]
) -> float:
    """How far towards the goal the agreement is greatest. Along the way it is a polynomial of degree 4: a tensor has
    units along two dimensions, and two parents meet in a product; of tensors with more it is approximated."""
    at = torch.linspace(0, 1, 5, dtype=torch.float64)
    values = [
        _agreement(places, weights, [_between(own, end, t) for own, end in zip(soft, goal, strict=True)])
        for t in at.tolist()
    ]
    powers = at[:, None] ** torch.arange(5)
    coefficients = torch.linalg.solve(powers, torch.tensor(values, dtype=torch.float64))
    fine = torch.linspace(0, 1, 1001, dtype=torch.float64)
    return float(fine[(fine[:, None] ** torch.arange(5) @ coefficients).argmax()])


def _permutation(symmetry: Symmetry, soft: Soft) -> Permutation:
    return tuple(
        UnitPermutation(best_assignment(soft[c])) if c in soft else leave(unit_class)
        for c, unit_class in enumerate(symmetry.classes)
    )
