"""Which unit of B plays the part of which unit of A: similarities of units, then linear assignment (design
4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from pleas.layers import Layer, find_layers
from pleas.rows import is_wide, output_covariance
from pleas.settings import MergeSettings
from pleas.statistics import Statistics
from pleas.symmetry import (
    Axis,
    Permutation,
    Symmetry,
    UnitClass,
    UnitPermutation,
    identity,
    permute_state,
    state_of,
)

AxisName = tuple[str, int]
DEAD = 1e-12  # relative variance below which a unit is constant


def match(
    symmetry: Symmetry, statistics: Statistics, a: nn.Module, b: nn.Module, settings: MergeSettings
) -> Permutation:
    """The permutation of B's units that lines them up with A's, class by class.

    Activation matching maximises the correlation of units, summed over every layer that reads or writes the
    class. Weight matching needs no statistics. Output units are never permuted: their order is the label
    order.
    """
    program = symmetry.program
    if settings.matching == "weight":
        return match_weights(symmetry, state_of(program, a), state_of(program, b))
    similarities = activation_similarities(symmetry, statistics, a, b)
    chosen = [
        _leave(unit_class) if index in symmetry.output else _assign(unit_class, similarities)[0]
        for index, unit_class in enumerate(symmetry.classes)
    ]
    return tuple(chosen)


def activation_similarities(
    symmetry: Symmetry, statistics: Statistics, a: nn.Module, b: nn.Module
) -> dict[AxisName, Tensor]:
    """Correlation of every position of A with every position of B, per axis of a weight: {(weight, dim):
    (P_a, P_b)}.

    dim 1: units as the layer's inputs. dim 0: units as its outputs, batch norm included, from the same
        moments.
    """
    states = [state_of(symmetry.program, parent) for parent in (a, b)]
    found: dict[AxisName, Tensor] = {}
    for layer in find_layers(symmetry.program):
        if layer.name in statistics.units:
            covariance = statistics.units[layer.name].covariance[0]
            found[layer.weight, 1] = _correlation(*_blocks(covariance))
            continue
        if is_wide(layer):  # its inputs are the outputs of another layer: matched there
            covariances = output_covariance(
                statistics.rows[layer.name], *(layer.matrix(s)[0] for s in states)
            )
            found[layer.weight, 0] = _correlation(*covariances)
            continue
        blocks = _blocks(statistics.joint[layer.name].covariance[0])
        found[layer.weight, 1] = _correlation(*(_sum_taps(block, layer) for block in blocks))
        weights = [layer.matrix(state)[0] for state in states]
        aa, ab, bb = blocks
        outputs = [
            torch.einsum("oi,ij,oj->o", w, block, w) for w, block in zip(weights, (aa, bb), strict=True)
        ]
        found[layer.weight, 0] = _correlation(outputs[0], weights[0] @ ab @ weights[1].T, outputs[1])
    return found


def _blocks(covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    half = len(covariance) // 2
    return covariance[:half, :half], covariance[:half, half:], covariance[half:, half:]


def _sum_taps(block: Tensor, layer: Layer) -> Tensor:
    """(taps * C, taps * C) -> (C, C): the covariance of channels, summed over the kernel's positions."""
    return (
        block.unflatten(0, (layer.taps, -1)).unflatten(2, (layer.taps, -1)).diagonal(dim1=0, dim2=2).sum(-1)
    )


def _correlation(aa: Tensor, ab: Tensor, bb: Tensor) -> Tensor:
    """Correlations from covariances (variances may be given as vectors). Constant (dead) units correlate with
    nothing."""
    inverse = []
    for block in (aa, bb):
        variance = block.diagonal() if block.dim() == 2 else block
        alive = variance > DEAD * variance.max()
        inverse.append(torch.where(alive, variance, 1).rsqrt() * alive)
    return inverse[0][:, None] * ab * inverse[1][None, :]


def _pairwise(axis: Axis, positions_b: Axis, similarity: Tensor) -> Tensor:
    """Sum over a unit's positions of the similarity of matching positions: (units_a, units_b)."""
    total = similarity.new_zeros((len(axis.index), len(positions_b.index)))
    for place_a, place_b in zip(axis.index.T, positions_b.index.T, strict=True):
        total += similarity[place_a[:, None], place_b[None, :]]
    return total


def _assign(unit_class: UnitClass, similarities: Mapping[AxisName, Tensor]) -> tuple[UnitPermutation, float]:
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
                total += _pairwise(axis_a, axis_b, similarity.double().cpu())
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


def _leave(unit_class: UnitClass) -> UnitPermutation:
    children = tuple(tuple(_leave(child) for child in unit) for unit in unit_class.children)
    return UnitPermutation(torch.arange(unit_class.size), children)


def match_weights(
    symmetry: Symmetry, a: Mapping[str, Tensor], b: Mapping[str, Tensor], *, sweeps: int = 100
) -> Permutation:
    """Git Re-Basin's weight matching (arXiv 2209.04836, algorithm 1): coordinate ascent on `sum <W_a,
    P(W_b)>`.

    Every class is assigned exactly given all the others; sweeps go on until nothing changes. Running
    statistics take no part.
    """
    permutation = _match_forward(symmetry, a, b)
    order = _by_depth(symmetry)
    generator = torch.Generator().manual_seed(0)
    for _ in range(sweeps):
        changed = False
        for step in torch.randperm(len(order), generator=generator).tolist():
            index = order[step]
            unit_class = symmetry.classes[index]
            similarities = _weight_similarities(symmetry, a, b, permutation, index)
            best, value = _assign(unit_class, similarities)
            if value > _value(unit_class, permutation[index], similarities) + 1e-9 * abs(value):
                permutation = _replace(permutation, index, best)
                changed = True
        if not changed:
            break
    return permutation


def _match_forward(symmetry: Symmetry, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Permutation:
    """Where the ascent starts: every class in order of depth, by the weights whose other axes are settled already.

    From the identity, the first classes to be assigned would see mostly weights that are not aligned yet.
    """
    permutation, settled = identity(symmetry), {-1, *symmetry.output}
    for index in _by_depth(symmetry):
        readable = _weight_similarities(symmetry, a, b, permutation, index, settled)
        if readable:
            permutation = _replace(permutation, index, _assign(symmetry.classes[index], readable)[0])
        settled.add(index)
    return permutation


def _by_depth(symmetry: Symmetry) -> list[int]:
    """Classes that may be permuted, in the order in which their first parameter is used."""
    place = {name: i for i, name in enumerate(symmetry.program.parameters)}
    first = {
        i: min((place[axis.tensor] for axis in c.axes if axis.tensor in place), default=len(place))
        for i, c in enumerate(symmetry.classes)
        if i not in symmetry.output
    }
    return sorted(first, key=lambda i: first[i])


def _weight_similarities(
    symmetry: Symmetry,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    permutation: Permutation,
    index: int,
    settled: set[int] | None = None,
) -> dict[AxisName, Tensor]:
    """Inner products of A's and B's slices along every parameter axis of a class, B's other classes being permuted.

    settled: use only tensors all of whose other units belong to these classes (-1: fixed); None for all tensors.
    """
    unit_class = symmetry.classes[index]
    aligned = permute_state(symmetry, b, _replace(permutation, index, _leave(unit_class)))
    parameters = set(symmetry.program.parameters)
    return {
        (axis.tensor, axis.dim): _inner_products(symmetry, a, aligned, axis)
        for axis in unit_class.axes
        if axis.tensor in parameters
        and (settled is None or _others(symmetry, axis, a[axis.tensor].dim()) <= settled)
    }


def _others(symmetry: Symmetry, axis: Axis, dims: int) -> set[int]:
    """Classes on the other axes of the axis's tensor."""
    found: set[int] = set()
    for dim in range(dims):
        if dim != axis.dim:
            found |= set(symmetry.axis(axis.tensor, dim).cls.unique().tolist())
    return found


def _replace(permutation: Permutation, index: int, new: UnitPermutation) -> Permutation:
    return (*permutation[:index], new, *permutation[index + 1 :])


def _value(unit_class: UnitClass, chosen: UnitPermutation, similarities: Mapping[AxisName, Tensor]) -> float:
    """Total similarity of a given pairing."""
    return float(similarity_of_pairs(unit_class, unit_class, chosen, similarities).sum())


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


def _inner_products(
    symmetry: Symmetry, a: Mapping[str, Tensor], b: Mapping[str, Tensor], axis: Axis
) -> Tensor:
    """(P, P) inner products of A's and B's slices along one axis of one tensor."""
    rows = [
        _slices(state[axis.tensor].double(), axis, symmetry.groups.get(axis.tensor, 1)) for state in (a, b)
    ]
    if rows[0].dim() == 3:  # virtual axis of a grouped weight: only slices of one group see the same outputs
        positions = rows[0].shape[0] * rows[0].shape[1]
        return torch.einsum("gik,hjk->gihj", *rows).reshape(positions, positions)
    return rows[0] @ rows[1].T


def _slices(tensor: Tensor, axis: Axis, groups: int) -> Tensor:
    if groups > 1 and axis.dim == 1:
        return tensor.unflatten(0, (groups, -1)).movedim(2, 1).flatten(2)
    return tensor.movedim(axis.dim, 0).reshape(tensor.shape[axis.dim], -1)
