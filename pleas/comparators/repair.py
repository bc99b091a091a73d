"""Batch norms of an averaged network: units that were averaged lose variance, which their norms have to know.

REPAIR (arXiv 2211.08403, section 4) resets them on images. Without a forward pass the statistics of the parents' units
tell what the mean of matched units has: model folding (arXiv 2502.10216, section 3.3) approximates it likewise.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pleas.baselines import has_batch_norm, reestimate_bn
from pleas.comparators.comparator import State
from pleas.evidence import Evidence
from pleas.layers.layer import BatchNorm, find_norms
from pleas.statistics.collect import Site, for_each
from pleas.symmetry import position_maps

DEAD = 1e-6  # of the largest scale of a norm: what a smaller one hides cannot be told from its output


def reestimated(network: nn.Module, evidence: Evidence) -> nn.Module:
    """The network, on the CPU, its batch norms re-estimated on the proxies; itself where it has none."""
    if not has_batch_norm(evidence.parents.symmetry):
        return network
    first = next(iter(merged_inputs(evidence)))
    return reestimate_bn(network.to(first.device), merged_inputs(evidence)).cpu()


def merged_inputs(evidence: Evidence) -> Iterator[Tensor]:
    """The proxies as the merged network takes them: the mean of what the parents take."""
    for batch in evidence.inputs:
        each = for_each(batch, evidence.parents)
        yield each[0] if all(x is each[0] for x in each) else sum(each[1:], each[0]) / len(each)


def closed_form(evidence: Evidence, state: State) -> dict[str, Tensor]:
    """Means and variances of the merged network's batch norms, where every merged unit is taken to be the mean of the
    parents' units u_p before their norms:

        E u = mean_p E u_p        Var u = mean_pq Cov(u_p, u_q)

    u_p is read off the output of p's norm, y_p = s_p u_p + t_p. Units of which a norm shows nothing (s_p about 0)
    keep the mean of the running statistics.
    """
    parents = evidence.parents
    found: dict[str, Tensor] = {}
    for layer in parents.layers:
        if layer.norm is not None and (layer.weight, 0) in evidence.statistics.units:
            affine = [layer.norm.affine(own) for own in evidence.states]
            found |= _statistics(evidence, (layer.weight, 0), layer.norm, affine, state)
    for norm in find_norms(parents.symmetry.program):
        if (norm.mean, 0) in evidence.statistics.units:  # what it reads is known itself
            ones = torch.ones(len(state[norm.mean]), dtype=torch.float64)
            alone = [(ones, torch.zeros_like(ones))] * parents.count
            found |= _statistics(evidence, (norm.mean, 0), norm, alone, state)
    return found


def _statistics(
    evidence: Evidence, site: Site, norm: BatchNorm, affine: list[tuple[Tensor, Tensor]], state: State
) -> dict[str, Tensor]:
    count = evidence.parents.count
    moments = evidence.statistics.units[site]
    means = moments.mean[0].unflatten(0, (count, -1))
    blocks = moments.covariance[0].unflatten(0, (count, -1)).unflatten(2, (count, -1))
    maps = [position_maps(evidence.parents.symmetry, alignment) for alignment in evidence.alignments]
    places = [found.get(site, torch.arange(blocks.shape[1])) for found in maps]
    scales = [scale.cpu() for scale, _ in affine]
    shows = torch.stack([scale.abs() > DEAD * scale.abs().max() for scale in scales]).all(0)
    safe = [torch.where(shows, scale, 1.0) for scale in scales]
    mean, variance = torch.zeros_like(safe[0]), torch.zeros_like(safe[0])
    for p in range(count):
        mean += (means[p][places[p]] - affine[p][1].cpu()) / safe[p] / count
        for q in range(count):
            variance += blocks[p][places[p], q, places[q]] / (safe[p] * safe[q]) / count**2
    old_mean, old_var = state[norm.mean], state[norm.var]
    return {
        norm.mean: torch.where(shows, mean, old_mean.double().cpu()).to(old_mean.dtype),
        norm.var: torch.where(shows, variance.clamp_min(0), old_var.double().cpu()).to(old_var.dtype),
    }
