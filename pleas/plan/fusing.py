"""What fusing costs: the error that a merged unit makes for the layers that read it.

Units x_p of the parents p in a mask, fused to their mean f, lose d_p = x_p - f. For a reader with weights V_p let
R_p = Cov(d_p | f) be what the fused inputs leave of d_p. Fusing unit u costs parent p

    tr(V_p R_u R_uu^-1 R_u^T V_p^T),

the error one gains by handing the reader d_u in addition. It is relative to the variance of the reader's outputs, and
costs add up over owners and readers. Covariances are those of the channels: what the kernel's positions share is left
out, which makes the moments of a 3 x 3 convolution 81 times smaller (decision 12).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pleas.layers.layer import Layer, is_wide
from pleas.matching.activations import activation_similarities
from pleas.matching.assign import similarity_of_pairs
from pleas.parents import Parents
from pleas.plan.layout import everyone, owners
from pleas.ridge import damped_solve
from pleas.statistics.collect import Statistics
from pleas.symmetry import DimUnits, Permutation, UnitClass, compose, inverse, permute_state, position_maps

MOST_PARTIAL = 4  # parents up to which a unit may be fused by some of them: every subset is priced
DAMPING = 1e-3
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Split:
    """One step towards keeping a unit apart: the merged unit `whole` becomes those of `parts`.

    saves:      predicted relative error that it avoids
    similarity: of the units that it parts
    """

    unit: int
    whole: int
    parts: tuple[int, ...]
    saves: float
    similarity: float


@dataclass(frozen=True)
class FusingCosts:
    """What is known of every unit of the widenable classes.

    error:      class -> mask -> (units,): predicted relative error of a unit fused by these parents
    similarity: class -> pair of parents -> (units,): correlation of their units, summed over the class's axes
    """

    error: Mapping[int, Mapping[int, Tensor]]
    similarity: Mapping[int, Mapping[tuple[int, int], Tensor]]
    parents: int

    def splits(self) -> dict[int, list[Split]]:
        """The splits of every class, least similar units first; of equals, the dearest to fuse."""
        return {c: self._of_class(c) for c in self.error}

    def _of_class(self, c: int) -> list[Split]:
        error, similarity = self.error[c], self.similarity[c]
        size = len(next(iter(error.values())))
        chains = [_chain(u, error, similarity, self.parents) for u in range(size)]
        # A unit's later splits wait for its earlier ones.
        order = []
        for chain in chains:
            reached = float("-inf")
            for step, split in enumerate(chain):
                reached = max(reached, split.similarity)
                order.append((reached, -sum(s.saves for s in chain), split.unit, step, split))
        order.sort(key=lambda item: item[:4])
        return [split for *_, split in order]


def _chain(
    unit: int,
    error: Mapping[int, Tensor],
    similarity: Mapping[tuple[int, int], Tensor],
    parents: int,
) -> list[Split]:
    """How a unit comes apart: at every step the part is split that saves most, into the parts that cost least.

    Of equals (a constant unit costs nothing) into those least alike, so that the order of parents does not matter.
    """
    masks, chain = [everyone(parents)], []

    def price(mask: int) -> float:
        return float(error[mask][unit]) if mask in error else 0.0

    def likeness(parts: Sequence[int]) -> float:
        between = [
            float(similarity[min(p, q), max(p, q)][unit])
            for one, other in itertools.combinations(parts, 2)
            for p, q in itertools.product(owners(one), owners(other))
        ]
        return sum(between) / len(between)

    while any(mask & (mask - 1) for mask in masks):
        options = [
            Split(unit, whole, parts, price(whole) - sum(price(part) for part in parts), likeness(parts))
            for whole in masks
            for parts in _parts(whole, parents)
        ]
        best = max(options, key=lambda split: (split.saves, -split.similarity))
        chain.append(best)
        masks.remove(best.whole)
        masks += best.parts
    return chain


def _parts(mask: int, parents: int) -> list[tuple[int, ...]]:
    """Ways to part a mask: in two; beyond MOST_PARTIAL parents, where subsets have no price, all at once."""
    held = owners(mask)
    if len(held) < 2:
        return []
    if parents > MOST_PARTIAL:
        return [tuple(1 << p for p in held)]
    first, rest = 1 << held[0], held[1:]
    subsets = itertools.chain.from_iterable(itertools.combinations(rest, k) for k in range(len(rest)))
    return [(one, mask & ~one) for chosen in subsets for one in [first | sum(1 << p for p in chosen)]]


def priced_masks(parents: int) -> list[int]:
    """The masks of two owners and more that costs are computed of."""
    masks = range(1, everyone(parents) + 1)
    more = [mask for mask in masks if len(owners(mask)) > 1]
    return more if parents <= MOST_PARTIAL else [everyone(parents)]


def fusing_costs(parents: Parents, statistics: Statistics, alignments: Sequence[Permutation]) -> FusingCosts:
    """Similarity of the matched units of every widenable class, and the predicted error of fusing them."""
    symmetry, count = parents.symmetry, parents.count
    widenable = [i for i, c in enumerate(symmetry.classes) if c.widenable and i not in symmetry.output]
    masks = priced_masks(count)
    costs = {
        i: {mask: torch.zeros(symmetry.classes[i].size, dtype=torch.float64) for mask in masks}
        for i in widenable
    }
    states = [permute_state(symmetry, s, p) for s, p in zip(parents.states, alignments, strict=True)]
    maps = [position_maps(symmetry, alignment) for alignment in alignments]
    for layer in parents.layers:
        units = symmetry.axis(layer.weight, 1)
        readable = [c for c in units.cls.unique().tolist() if c in costs]
        if not readable or is_wide(layer):
            continue
        weights = [layer.matrix(state)[0].cpu() for state in states]
        covariance = _aligned(layer, statistics, [m.get((layer.weight, 1)) for m in maps], count)
        _add_costs(layer, units, covariance, weights, {c: costs[c] for c in readable}, symmetry.classes)
    alike: dict[int, dict[tuple[int, int], Tensor]] = {i: {} for i in widenable}
    for p, q in itertools.combinations(range(count), 2):
        similarities = activation_similarities(statistics, count, p, q)
        between = compose(inverse(alignments[p]), alignments[q])
        for c in widenable:
            own = similarity_of_pairs(symmetry.classes[c], symmetry.classes[c], between[c], similarities)
            alike[c][p, q] = own[alignments[p][c].perm]
    return FusingCosts(costs, alike, count)


def _aligned(
    layer: Layer, statistics: Statistics, maps: Iterable[Tensor | None], count: int
) -> list[list[Tensor]]:
    """Cov(x_p, x_q) of the layer's channels in the common order, by pair of parents."""
    blocks = statistics.units[layer.weight, 1].covariance[0].double()
    blocks = blocks.unflatten(0, (count, -1)).unflatten(2, (count, -1))
    index = [m if m is not None else torch.arange(blocks.shape[1]) for m in maps]
    return [[blocks[p][index[p]][:, q][:, index[q]] for q in range(count)] for p in range(count)]


def _add_costs(
    layer: Layer,
    units: DimUnits,
    covariance: list[list[Tensor]],
    weights: Sequence[Tensor],
    costs: Mapping[int, Mapping[int, Tensor]],
    classes: Sequence[UnitClass],
) -> None:
    channels = layer.channels
    readers = [
        _by_channel(layer, weight) for weight in weights
    ]  # (outputs, taps, channels), grouped: own inputs only
    scale = max(sum(_energy(layer, v, covariance[p][p]) for p, v in enumerate(readers)), TINY)
    masks = {mask for of_class in costs.values() for mask in of_class}
    for mask in masks:
        held = owners(mask)
        share = 1 / len(held)
        cross = {p: share * torch.stack([covariance[p][q] for q in held]).sum(0) for p in held}  # Cov(x_p, f)
        fused = share * torch.stack([cross[p] for p in held]).sum(0)
        damping = DAMPING * fused.diagonal().mean().clamp_min(TINY)
        for p in held:
            lost = covariance[p][p] - cross[p] - cross[p].T + fused
            with_fused = fused - cross[p].T  # Cov(f, f - x_p)
            if layer.groups > 1:  # a grouped layer cannot make up for a channel by those of other groups
                own = fused.diagonal() + damping
                residual = (lost.diagonal() - with_fused.diagonal().square() / own).clamp_min(0)
                price = readers[p].square().sum((0, 1)) * residual
                for c, of_class in costs.items():
                    here = units.cls == c
                    of_class[mask].index_add_(0, units.unit[here], price[here] / scale)
                continue
            residual = lost - with_fused.T @ damped_solve(fused, damping, with_fused, layer.name)
            for c, of_class in costs.items():
                index = _positions_of_units(units, c, classes[c].size)
                rows = readers[p].reshape(-1, channels)
                of_class[mask].add_(
                    _cost_of_units(rows, residual, fused.diagonal(), index, layer.name) / scale
                )


def _by_channel(layer: Layer, weight: Tensor) -> Tensor:
    """(o, d_in) -> (outputs, taps, channels); a grouped layer's rows by the output's place in its group."""
    if layer.groups == 1:
        return weight.unflatten(1, (layer.taps, -1))
    per_in = layer.channels // layer.groups
    apart = weight.unflatten(0, (layer.groups, -1)).unflatten(2, (layer.taps, per_in))  # (g, o, taps, i)
    return apart.movedim(0, 2).flatten(2)


def _energy(layer: Layer, reader: Tensor, covariance: Tensor) -> float:
    if layer.groups > 1:
        return float((reader.square().sum((0, 1)) * covariance.diagonal()).sum())
    rows = reader.flatten(0, 1)
    return float(((rows @ covariance) * rows).sum())


def _positions_of_units(units: DimUnits, c: int, size: int) -> Tensor:
    """(units, positions per unit) of each unit on the axis."""
    here = (units.cls == c).nonzero()[:, 0]
    order = torch.argsort(units.unit[here], stable=True)
    return here[order].view(size, -1)


def _cost_of_units(weights: Tensor, residual: Tensor, variance: Tensor, index: Tensor, name: str) -> Tensor:
    projected = (weights @ residual)[:, index].movedim(1, 0)  # (units, rows, k)
    own = residual[index[:, :, None], index[:, None, :]]  # (units, k, k)
    # What is lost of nearly equal units is rounding: below a millionth of their variance it counts as nothing.
    floor = (1e-6 * variance.mean()).clamp_min(TINY)
    damping = torch.maximum(DAMPING * own.diagonal(dim1=1, dim2=2).mean(1), floor)
    solved = damped_solve(own, damping, projected.mT, name)
    return (projected.mT * solved).sum((1, 2)).clamp_min(0)
