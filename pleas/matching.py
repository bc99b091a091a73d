"""Which unit of one parent plays the part of which unit of another: similarities of units, then linear assignment."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pleas.parents import Parents
from pleas.statistics import Statistics
from pleas.symmetry import (
    Axis,
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

AxisName = tuple[str, int]
Similarities = Mapping[AxisName, Tensor]
DEAD = 1e-12  # relative variance below which a unit is constant
SWEEPS = 20  # of the alternation between three parents or more, at most


def match(parents: Parents, statistics: Statistics | None) -> tuple[Permutation, ...]:
    """For every parent the permutation of its units that lines them up with the first parent's, class by class.

    Activation matching maximises the correlation of units, summed over every layer that reads or writes the
    class and over all pairs of parents. Weight matching needs no statistics. Output units are never permuted: their
    order is the label order.
    """
    if parents.settings.matching == "weight":
        return _to_a_common_order(parents, _WeightPairs(parents))
    assert statistics is not None
    return _to_a_common_order(parents, _ActivationPairs(parents, statistics))


class _ActivationPairs:
    """Assignments of one parent to another from the correlations of their units."""

    def __init__(self, parents: Parents, statistics: Statistics) -> None:
        self.symmetry = parents.symmetry
        self._blocks = {
            pair: activation_similarities(statistics, parents.count, *pair)
            for pair in itertools.permutations(range(parents.count), 2)
            if pair[0] < pair[1]
        }

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
                chosen.append(_leave(unit_class))
                continue
            best, found = _assign(unit_class, similarities)
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
        total = {name: _sum([state[name] for state in aligned]) for name in aligned[0]}
        return match_weights(self.symmetry, total, self._states[q])


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    same = [x for x in tensors if x.shape == tensors[0].shape]
    return sum(same[1:], same[0]) if same[0].is_floating_point() else same[0]


def _to_a_common_order(parents: Parents, pairs: _ActivationPairs | _WeightPairs) -> tuple[Permutation, ...]:
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


def activation_similarities(
    statistics: Statistics, count: int, p: int = 0, q: int = 1
) -> dict[AxisName, Tensor]:
    """Correlation of every position of parent p with every position of q, per axis: {(weight, dim): (P_p, P_q)}.

    dim 1: units as the layer's inputs. dim 0: units as its outputs, batch norm included.
    """
    found: dict[AxisName, Tensor] = {}
    for axis, moments in statistics.units.items():
        blocks = moments.covariance[0].unflatten(0, (count, -1)).unflatten(2, (count, -1))
        found[axis] = _correlation(blocks[p, :, p].diagonal(), blocks[p, :, q], blocks[q, :, q].diagonal())
    return found


def _correlation(aa: Tensor, ab: Tensor, bb: Tensor) -> Tensor:
    """Correlations from variances (P_a,), (P_b,) and covariances. Constant (dead) units correlate with nothing."""
    scale = []
    for variance in (aa, bb):
        alive = variance > DEAD * variance.max()
        scale.append(torch.where(alive, variance, 1).rsqrt() * alive)
    return scale[0][:, None] * ab * scale[1][None, :]


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
) -> tuple[Permutation, float]:
    """Git Re-Basin's weight matching (arXiv 2209.04836, algorithm 1): coordinate ascent on `sum <W_a,
    P(W_b)>`.

    Every class is assigned exactly given all the others; sweeps go on until nothing changes. Running
    statistics take no part. Returns the permutation of b and the total it reaches.
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
