"""How well one set of images stands in for another: the least-squares problems of a merge at 1.0x, posed from each.

Problems posed from proxies and from real images share the parents' common order, so that their weights can be exchanged
and compared. Every layer is posed by itself, on the mean of the parents' inputs (`propagate = 0`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pleas.evidence import Evidence
from pleas.layers.layer import Layer, is_wide
from pleas.network.average import mean_of_owners
from pleas.plan.blocks import Block
from pleas.plan.layout import plain_layout
from pleas.solve.equations import Equations, prior_of
from pleas.solve.propagate import images_first, parents_at, rows_of, target_rows
from pleas.statistics.collect import Batch, for_each, placed
from pleas.statistics.sampler import PositionSampler

LARGEST = 1536  # inputs of a layer above which it is left out: eigenvalues cost d^3
_EXACT = 1e-9  # errors below this share of the targets' variance are rounding: the layer fits exactly
_ROWS = 2  # times a layer's inputs: with fewer rows a fit is nearly exact and compares with nothing


@dataclass(frozen=True)
class Cover:
    """One layer's proxies against real images.

    cosine:   of the two matrices E[z z^T], z the merged layer's inputs
    coverage: eigenvalues of (Cov_real, Cov_proxy + ridge) at the median, the 95th percentile and the top: how many
              times more real energy than proxy energy a direction holds
    excess:   error on real images of the weights fitted on proxies, over that of the weights fitted on real ones,
              less 1; 0 where both fit exactly, as the first layer does: its inputs are the same image; None where
              there are too few real rows (under twice the inputs) for their own fit to mean anything
    """

    layer: str
    cosine: float
    coverage: tuple[float, float, float]
    excess: float | None


def cover(evidence: Evidence, real: Iterable[Batch]) -> list[Cover]:
    """The images of `evidence` against `real` ones: every ungrouped layer that is not too large to take apart."""
    proxies, known = layer_problems(evidence), layer_problems(replace(evidence, inputs=real))
    return [_cover(layer, proxies[layer.name], known[layer.name], evidence) for layer in _taken(evidence)]


def layer_problems(evidence: Evidence) -> Mapping[str, Equations]:
    """The problem of every layer that `cover` compares, all units fused."""
    parents, layers = evidence.parents, _taken(evidence)
    sums: dict[str, Equations] = {}
    for layer in layers:
        inputs, outputs = (plain_layout(size, parents.count) for size in (layer.channels, layer.out_units))
        sums[layer.name] = Equations(
            layer, prior_of(layer, [layer.matrix(state) for state in evidence.states], inputs, outputs)
        )
    owner = {node: layer for layer in layers for node in layer.nodes}
    sampler = PositionSampler(parents.settings, None)  # the same share of every image, however many there are
    states: list[dict[str, Tensor]] | None = None
    index = 0
    with torch.no_grad():
        for batch in evidence.inputs:
            each = for_each(batch, parents)
            states = states or placed(evidence.states, each[0])
            for node, xs, ys in parents_at(parents.symmetry.program.graph, states, each, owner):
                layer = owner[node.name]
                z = images_first(mean_of_owners(xs, {}), node.args[0])  # type: ignore[arg-type]
                t = images_first(mean_of_owners(_normed(layer, ys, states), {}), node)
                total = int(torch.Size(t.shape[2:] if layer.is_convolution else t.shape[1:-1]).numel())
                places = sampler(total, layer.d_in, len(z), len(each[0]), index)
                sums[layer.name].add(rows_of(layer, z, places), target_rows(layer, t, places))
            index += len(each[0])
    return sums


def _taken(evidence: Evidence) -> list[Layer]:
    return [
        layer
        for layer in evidence.parents.layers
        if layer.groups == 1 and layer.d_in <= LARGEST and not is_wide(layer) and _one_size(layer, evidence)
    ]


def _one_size(layer: Layer, evidence: Evidence) -> bool:
    """Whether all parents have the same outputs there; heads of separate labels need not."""
    return len({state[layer.weight].shape for state in evidence.states}) == 1


def _normed(layer: Layer, ys: list[Tensor], states: list[dict[str, Tensor]]) -> list[Tensor]:
    if layer.norm is None:
        return ys
    found = []
    for y, state in zip(ys, states, strict=True):
        scale, shift = (v.to(y).view(-1, *(1,) * (y.dim() - 2)) for v in layer.norm.affine(state))
        found.append(y * scale + shift)
    return found


def _cover(layer: Layer, proxies: Equations, real: Equations, evidence: Evidence) -> Cover:
    (gram, mean), (real_gram, real_mean) = proxies.moments(), real.moments()
    second = [gram + torch.outer(mean, mean), real_gram + torch.outer(real_mean, real_mean)]
    cosine = (second[0] * second[1]).sum() / (second[0].norm() * second[1].norm())
    ridge = evidence.parents.settings.ridge * gram.diagonal().mean()
    own, vectors = torch.linalg.eigh(gram)
    whitening = vectors * (own.clamp_min(0) + ridge).rsqrt()
    values = torch.linalg.eigvalsh(whitening.T @ real_gram @ whitening)
    middle, high, top = (float(values.quantile(share)) for share in (0.5, 0.95, 1.0))
    enough = real.count >= _ROWS * layer.d_in
    return Cover(
        layer.name, float(cosine), (middle, high, top), _excess(proxies, real, evidence) if enough else None
    )


def _excess(proxies: Equations, real: Equations, evidence: Evidence) -> float:
    settings, everything = evidence.parents.settings, torch.arange(proxies.layer.channels)
    blocks = (Block(torch.arange(proxies.layer.out_units), everything),)
    fitted, best = (one.solve(blocks, settings.ridge, settings.min_rows) for one in (proxies, real))
    floor = _EXACT * float(best.target.sum())
    error = max(real.error(fitted.weight, fitted.bias), floor)
    return error / max(real.error(best.weight, best.bias), floor) - 1
