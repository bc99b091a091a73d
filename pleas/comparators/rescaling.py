"""REPAIR for layers without a batch norm: their units get back the mean and spread that the parents' units have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from pleas.comparators.comparator import State
from pleas.comparators.walk import Walk
from pleas.evidence import Evidence
from pleas.layers.layer import Layer
from pleas.symmetry import Symmetry, position_maps

LEAST = 1e-6  # standard deviation, relative to a layer's largest, below which a unit is left alone


def touches_output(symmetry: Symmetry, name: str) -> bool:
    """Whether a tensor has outputs of the network along one of its axes."""
    dims = range(len(symmetry.shapes.get(name, ())))
    return any(set(symmetry.axis(name, dim).cls.unique().tolist()) & set(symmetry.output) for dim in dims)


def rescaled(evidence: Evidence, state: State) -> dict[str, Tensor]:
    """Tensors of the merged network in which every unit that a layer writes has the mean of the parents' means and of
    their standard deviations on the proxies (REPAIR, arXiv 2211.08403), first layer to last.

    A layer without a bias keeps its mean. Layers that write the outputs are left alone, and so are those used twice.
    Batch norms are re-estimated.
    """
    return _Rescaling(evidence, state, norms=True).go()


class _Rescaling(Walk):
    def __init__(self, evidence: Evidence, state: State, *, norms: bool) -> None:
        super().__init__(evidence, state, norms=norms)
        symmetry = evidence.parents.symmetry
        self.layers = {
            layer.nodes[0]: layer
            for layer in evidence.parents.layers
            if layer.norm is None
            and len(layer.nodes) == 1
            and (layer.weight, 0) in evidence.statistics.units
            and not touches_output(symmetry, layer.weight)
            and layer.weight not in symmetry.program.added
        }
        self.maps = [position_maps(symmetry, alignment) for alignment in evidence.alignments]

    def reach(self, node: fx.Node, args: list[tuple[Any, ...]]) -> None:
        layer = self.layers.get(node.name)
        if layer is None:
            return
        units = 1 if layer.is_convolution else -1
        values = torch.cat([node.target(*arguments) for arguments in args])  # type: ignore[operator]
        values = values.movedim(units, -1).flatten(0, -2).double()
        own_mean, own = values.mean(0).cpu(), values.std(0, correction=0).cpu()
        mean, spread = self._wanted(layer)
        safe = own > LEAST * own.max()
        scale = torch.where(safe, spread / torch.where(safe, own, 1.0), 1.0)
        weight = self.state[layer.weight]
        self.set(layer.weight, weight * scale.to(weight).view(-1, *(1,) * (weight.dim() - 1)))
        if layer.bias is not None:
            bias = self.state[layer.bias]
            moved = (bias.double().cpu() - own_mean) * scale + torch.where(safe, mean, own_mean)
            self.set(layer.bias, moved.to(bias))

    def _wanted(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Mean over parents of the means and standard deviations of their matched units, (units,) each."""
        site, count = (layer.weight, 0), len(self.maps)
        moments = self.evidence.statistics.units[site]
        means = moments.mean[0].unflatten(0, (count, -1))
        spreads = moments.covariance[0].diagonal().clamp_min(0).sqrt().unflatten(0, (count, -1))
        places = [found.get(site, torch.arange(means.shape[1])) for found in self.maps]
        mean = torch.stack([row[index] for row, index in zip(means, places, strict=True)]).mean(0)
        spread = torch.stack([row[index] for row, index in zip(spreads, places, strict=True)]).mean(0)
        return mean, spread
