"""Linear assignment of the units of a class from their similarities, groups and their members together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pleas.symmetry import Axis, UnitClass, UnitPermutation

AxisName = tuple[str, int]
Similarities = Mapping[AxisName, Tensor]


def assign(unit_class: UnitClass, similarities: Mapping[AxisName, Tensor]) -> tuple[UnitPermutation, float]:
    return _assign_between(unit_class, unit_class, similarities)


def _assign_between(
    class_a: UnitClass, class_b: UnitClass, similarities: Mapping[AxisName, Tensor]
) -> tuple[UnitPermutation, float]:
    """Best pairing of the units of two alike classes, and its total similarity.

    Where units have inner freedom (the channels of a group, the dimensions of a head), the similarity of two
    units is the best total over pairings of their insides, so the assignment is exact for the whole tree.
    """
    if not class_a.children:
        total = torch.zeros((class_a.size, class_b.size), dtype=torch.float64)
        for axis_a, axis_b in zip(class_a.axes, class_b.axes, strict=True):
            similarity = similarities.get((axis_a.tensor, axis_a.dim))
            if similarity is not None:
                total += pairwise(axis_a, axis_b, similarity.double().cpu())
        perm = best_assignment(total)
        value = float(total[torch.arange(len(perm)), perm].sum())
        return UnitPermutation(perm, ()), value
    inner = [
        [_assign_children(unit_a, unit_b, similarities) for unit_b in class_b.children]
        for unit_a in class_a.children
    ]
    total = torch.tensor([[value for _, value in row] for row in inner], dtype=torch.float64)
    perm = best_assignment(total)
    children = tuple(inner[u][v][0] for u, v in enumerate(perm.tolist()))
    return UnitPermutation(perm, children), float(total[torch.arange(len(perm)), perm].sum())


def _assign_children(
    unit_a: tuple[UnitClass, ...], unit_b: tuple[UnitClass, ...], similarities: Mapping[AxisName, Tensor]
) -> tuple[tuple[UnitPermutation, ...], float]:
    pairs = [_assign_between(x, y, similarities) for x, y in zip(unit_a, unit_b, strict=True)]
    return tuple(p for p, _ in pairs), sum(value for _, value in pairs)


def best_assignment(similarity: Tensor) -> Tensor:
    """perm (n,) with `sum_u similarity[u, perm[u]]` greatest; scipy's exact linear assignment."""
    _, columns = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).long()


def leave(unit_class: UnitClass) -> UnitPermutation:
    children = tuple(tuple(leave(child) for child in unit) for unit in unit_class.children)
    return UnitPermutation(torch.arange(unit_class.size), children)


def value_of(
    unit_class: UnitClass, chosen: UnitPermutation, similarities: Mapping[AxisName, Tensor]
) -> float:
    """Total similarity of a given pairing."""
    return float(similarity_of_pairs(unit_class, unit_class, chosen, similarities).sum())


def pairwise(axis: Axis, positions_b: Axis, similarity: Tensor) -> Tensor:
    """Sum over a unit's positions of the similarity of matching positions: (units_a, units_b)."""
    total = similarity.new_zeros((len(axis.index), len(positions_b.index)))
    for place_a, place_b in zip(axis.index.T, positions_b.index.T, strict=True):
        total += similarity[place_a[:, None], place_b[None, :]]
    return total


def similarity_of_pairs(
    class_a: UnitClass, class_b: UnitClass, chosen: UnitPermutation, similarities: Mapping[AxisName, Tensor]
) -> Tensor:
    """(units,) similarity of every pair of a pairing, summed over the class's axes (and the units inside)."""
    total = torch.zeros(class_a.size, dtype=torch.float64)
    if class_a.children:
        for u, v in enumerate(chosen.perm.tolist()):
            inside = zip(class_a.children[u], class_b.children[v], chosen.children[u], strict=True)
            total[u] = sum(
                float(similarity_of_pairs(x, y, inner, similarities).sum()) for x, y, inner in inside
            )
        return total
    for axis_a, axis_b in zip(class_a.axes, class_b.axes, strict=True):
        similarity = similarities.get((axis_a.tensor, axis_a.dim))
        if similarity is not None:
            total += similarity.double().cpu()[axis_a.index, axis_b.index[chosen.perm]].sum(1)
    return total
