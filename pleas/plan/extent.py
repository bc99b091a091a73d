"""What every class of units governs: the parameters that stand on it, and the multiply-adds of the ops that touch it.

Most weights stand on two classes, their outputs' and their inputs', and count for both: the numbers of all classes add
up to more than the network has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from pleas.plan.cost import FlopModel
from pleas.symmetry import Symmetry


@dataclass(frozen=True)
class Extent:
    """Elements of parameters, and multiply-adds for one image."""

    parameters: int
    multiply_adds: int


def extents(symmetry: Symmetry) -> tuple[Extent, tuple[Extent, ...]]:
    """Of the whole network, and of every top-level class."""
    costs = FlopModel(symmetry)
    names: dict[int, list[str]] = {}
    for k, cls in enumerate(symmetry.classes):
        names[k] = list(dict.fromkeys(axis.tensor for axis in cls.axes))
    learnt = set(symmetry.program.parameters)
    total = sum(math.prod(symmetry.shapes[name]) for name in learnt)
    parts = tuple(
        Extent(
            sum(_elements(symmetry, name, k) for name in names[k] if name in learnt),
            costs.total({}, [k]) // 2,
        )
        for k in range(len(symmetry.classes))
    )
    return Extent(total, costs.parent // 2), parts


def _elements(symmetry: Symmetry, name: str, k: int) -> int:
    """Elements of a tensor that stand on class k along at least one axis."""
    shape = symmetry.shapes[name]
    groups = symmetry.groups.get(name, 1)
    away = [(symmetry.axis(name, dim).cls != k) for dim in range(len(shape))]
    if groups == 1 or len(shape) < 2:
        return math.prod(shape) - math.prod(int(still.sum()) for still in away)
    outputs, inputs = (_by_group(still, groups) for still in away[:2])
    rest = math.prod(int(still.sum()) for still in away[2:])
    return math.prod(shape) - int((outputs * inputs).sum()) * rest


def _by_group(still: Tensor, groups: int) -> Tensor:
    return still.reshape(groups, -1).sum(1)
