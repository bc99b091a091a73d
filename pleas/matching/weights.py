"""Matching from the weights alone: forward through the layers, then sweeps (Git Re-Basin, arXiv 2209.04836)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from pleas.matching.assign import AxisName, assign, leave, value_of
from pleas.symmetry import (
    Axis,
    Permutation,
    Symmetry,
    UnitPermutation,
    identity,
    permute_state,
)


def match_weights(
    symmetry: Symmetry,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    *,
    start: Permutation | None = None,
    sweeps: int = 100,
) -> tuple[Permutation, float]:
    """Git Re-Basin's weight matching (arXiv 2209.04836, algorithm 1): coordinate ascent on `sum <W_a,
    P(W_b)>`.

    Every class is assigned exactly given all the others; sweeps go on until nothing changes. Running statistics take no
    part. start: of the ascent, by default what one pass forward gives. Returns the permutation of b and the total it
    reaches.
    """
    permutation = _match_forward(symmetry, a, b) if start is None else start
    order = by_depth(symmetry)
    generator = torch.Generator().manual_seed(0)
    for _ in range(sweeps):
        changed = False
        for step in torch.randperm(len(order), generator=generator).tolist():
            index = order[step]
            unit_class = symmetry.classes[index]
            similarities = weight_similarities(symmetry, a, b, permutation, index)
            best, value = assign(unit_class, similarities)
            if value > value_of(unit_class, permutation[index], similarities) + 1e-9 * abs(value):
                permutation = with_class(permutation, index, best)
                changed = True
        if not changed:
            break
    aligned = permute_state(symmetry, b, permutation)
    total = sum(
        float((a[name].double() * aligned[name].double()).sum())
        for name in symmetry.program.parameters
        if a[name].shape == aligned[name].shape
    )
    return permutation, total


def _match_forward(symmetry: Symmetry, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Permutation:
    """Where the ascent starts: every class in order of depth, by the weights whose other axes are settled already.

    From the identity, the first classes to be assigned would see mostly weights that are not aligned yet.
    """
    permutation, settled = identity(symmetry), {-1, *symmetry.output}
    for index in by_depth(symmetry):
        readable = weight_similarities(symmetry, a, b, permutation, index, settled)
        if readable:
            permutation = with_class(permutation, index, assign(symmetry.classes[index], readable)[0])
        settled.add(index)
    return permutation


def by_depth(symmetry: Symmetry) -> list[int]:
    """Classes that may be permuted, in the order in which their first parameter is used."""
    place = {name: i for i, name in enumerate(symmetry.program.parameters)}
    first = {
        i: min((place[axis.tensor] for axis in c.axes if axis.tensor in place), default=len(place))
        for i, c in enumerate(symmetry.classes)
        if i not in symmetry.output
    }
    return sorted(first, key=lambda i: first[i])


def weight_similarities(
    symmetry: Symmetry,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    permutation: Permutation,
    index: int,
    settled: set[int] | None = None,
    *,
    cosine: bool = False,
) -> dict[AxisName, Tensor]:
    """Inner products of A's and B's slices along every parameter axis of a class, B's other classes being permuted.

    cosine:  of slices of length 1
    settled: use only tensors all of whose other units belong to these classes (-1: fixed); None for all tensors.
    """
    unit_class = symmetry.classes[index]
    aligned = permute_state(symmetry, b, with_class(permutation, index, leave(unit_class)))
    parameters = set(symmetry.program.parameters)
    return {
        (axis.tensor, axis.dim): _inner_products(symmetry, a, aligned, axis, cosine)
        for axis in unit_class.axes
        if axis.tensor in parameters
        and a[axis.tensor].shape == aligned[axis.tensor].shape  # heads of other label sets do not compare
        and (settled is None or _others(symmetry, axis, a[axis.tensor].dim()) <= settled)
    }


def _others(symmetry: Symmetry, axis: Axis, dims: int) -> set[int]:
    """Classes on the other axes of the axis's tensor."""
    found: set[int] = set()
    for dim in range(dims):
        if dim != axis.dim:
            found |= set(symmetry.axis(axis.tensor, dim).cls.unique().tolist())
    return found


def with_class(permutation: Permutation, index: int, new: UnitPermutation) -> Permutation:
    """The permutation with another one of one class."""
    return (*permutation[:index], new, *permutation[index + 1 :])


def _inner_products(
    symmetry: Symmetry, a: Mapping[str, Tensor], b: Mapping[str, Tensor], axis: Axis, cosine: bool
) -> Tensor:
    """(P, P) inner products of A's and B's slices along one axis of one tensor."""
    rows = [
        _slices(state[axis.tensor].double(), axis, symmetry.groups.get(axis.tensor, 1)) for state in (a, b)
    ]
    if cosine:
        rows = [F.normalize(x, dim=-1) for x in rows]
    if rows[0].dim() == 3:  # virtual axis of a grouped weight: only slices of one group see the same outputs
        positions = rows[0].shape[0] * rows[0].shape[1]
        return torch.einsum("gik,hjk->gihj", *rows).reshape(positions, positions)
    return rows[0] @ rows[1].T


def _slices(tensor: Tensor, axis: Axis, groups: int) -> Tensor:
    if groups > 1 and axis.dim == 1:
        return tensor.unflatten(0, (groups, -1)).movedim(2, 1).flatten(2)
    return tensor.movedim(axis.dim, 0).reshape(tensor.shape[axis.dim], -1)
