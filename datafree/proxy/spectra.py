"""What the second moments of a set of proxies can and cannot say: rank, stability of the matching, and, against a
few real images, how much of the real energy they cover.

`Frame` holds the least-squares problems of a merge at 1.0x, layer by layer; a problem posed from proxies and one
posed from real images share the frame, so their weights can be exchanged and compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import pleas
from pleas.layers import Layer, find_layers
from pleas.rows import is_wide
from pleas.solve import Problem, blocks_of, pose, solve
from pleas.symmetry import Permutation, UnitPermutation, permute_state, position_maps, state_of
from pleas.widen import Layouts

_LARGEST = 1536  # inputs of a layer above which its channels alone are looked at: eigenvalues cost d^3
_EXACT = 1e-9  # errors below this share of the targets' variance are rounding: the layer fits exactly
_ROWS = 2  # times a layer's inputs: with fewer real rows their fit is nearly exact and compares with nothing
_DEAD = 1e-4  # eigenvalues below this share of the largest are directions the proxies hardly excite


@dataclass(frozen=True)
class Rank:
    """Directions of one parent's inputs to one layer.

    effective: exp of the entropy of the covariance's normalised eigenvalues, between 1 and `size`
    dead:      eigenvalues below 1e-4 of the largest
    """

    layer: str
    size: int
    effective: float
    dead: int


def ranks(symmetry: pleas.Symmetry, statistics: pleas.Statistics) -> tuple[list[Rank], list[Rank]]:
    """Per layer, for A and for B, from the covariance of their inputs."""
    found: tuple[list[Rank], list[Rank]] = ([], [])
    for layer in find_layers(symmetry.program):
        for parent, covariance in enumerate(_own_covariances(layer, statistics)):
            values = torch.linalg.eigvalsh(covariance).clamp_min(0)
            shares = values / values.sum().clamp_min(1e-300)
            entropy = -(shares * shares.clamp_min(1e-300).log()).sum()
            dead = int((values <= _DEAD * values.max()).sum())
            found[parent].append(Rank(layer.name, len(values), float(entropy.exp()), dead))
    return found


def _own_covariances(layer: Layer, statistics: pleas.Statistics) -> tuple[Tensor, Tensor]:
    """A's and B's covariance of the layer's inputs; of its channels where the inputs are too many."""
    if is_wide(layer):
        halves = statistics.rows[layer.name].halves()
        return (_gram(halves[0]), _gram(halves[1]))
    if layer.name in statistics.units:
        both = statistics.units[layer.name].covariance[0]
    else:
        both = statistics.joint[layer.name].covariance[0]
    half = len(both) // 2
    blocks = both[:half, :half], both[half:, half:]
    if half <= _LARGEST or layer.name in statistics.units:
        return blocks
    return _channels(blocks[0], layer.taps), _channels(blocks[1], layer.taps)


def _channels(covariance: Tensor, taps: int) -> Tensor:
    """Covariance of channels, averaged over the kernel's positions."""
    parts = covariance.unflatten(0, (taps, -1)).unflatten(2, (taps, -1))
    return parts.diagonal(dim1=0, dim2=2).mean(-1)


def _gram(rows: Tensor) -> Tensor:
    """(n, n): the eigenvalues of the covariance of `rows` (n, d) that are not 0 for want of rows."""
    centred = (rows - rows.mean(0)).double()
    return centred @ centred.T / len(rows)


def shared_assignments(symmetry: pleas.Symmetry, one: Permutation, two: Permutation) -> float:
    """Share of units that both matchings pair alike, output units left out; a unit with inner units counts those."""
    same, total = 0, 0
    for index, (first, second) in enumerate(zip(one, two, strict=True)):
        if index not in symmetry.output:
            alike, units = _compare(first, second)
            same, total = same + alike, total + units
    return same / total if total else 1.0


def _compare(one: UnitPermutation, two: UnitPermutation) -> tuple[int, int]:
    alike = one.perm == two.perm
    if not one.children:
        return int(alike.sum()), len(alike)
    same, total = 0, 0
    for equal, first, second in zip(alike.tolist(), one.children, two.children, strict=True):
        for child, other in zip(first, second, strict=True):
            inner, units = _compare(child, other)
            same, total = same + (inner if equal else 0), total + units
    return same, total


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


class Frame:
    """The merge at 1.0x under one matching, as least-squares problems."""

    def __init__(
        self,
        symmetry: pleas.Symmetry,
        statistics: pleas.Statistics,
        matching: Permutation,
        a: nn.Module,
        b: nn.Module,
        settings: pleas.MergeSettings,
    ) -> None:
        plan = pleas.make_plan(symmetry, statistics, matching, a, b, settings, apart=0.0)
        program = symmetry.program
        self._layouts = Layouts(symmetry, plan.classes)
        self._states = (state_of(program, a), permute_state(symmetry, state_of(program, b), matching))
        self._maps = position_maps(symmetry, matching)
        self._settings = settings
        self._layers = find_layers(program)

    def cover(self, proxies: pleas.Statistics, real: pleas.Statistics) -> list[Cover]:
        """Every layer that has joint moments and is not too large to take apart."""
        found = []
        for layer in self._layers:
            if layer.name in proxies.joint and layer.d_in <= _LARGEST:
                enough = real.joint[layer.name].count >= _ROWS * layer.d_in
                found.append(self._cover(layer, self._pose(layer, proxies), self._pose(layer, real), enough))
        return found

    def _pose(self, layer: Layer, statistics: pleas.Statistics) -> Problem:
        a, b = (layer.matrix(state) for state in self._states)
        alignment = self._maps.get((layer.weight, 1), torch.arange(layer.channels))
        return pose(layer, statistics.joint[layer.name], a, b, alignment, *self._axes(layer))

    def _axes(self, layer: Layer):
        return self._layouts.axis(layer.weight, 1), self._layouts.axis(layer.weight, 0)

    def _cover(self, layer: Layer, proxies: Problem, real: Problem, enough: bool) -> Cover:
        second = [one.gram + torch.outer(one.mean_in, one.mean_in) for one in (proxies, real)]
        cosine = (second[0] * second[1]).sum() / (second[0].norm() * second[1].norm())
        size = len(proxies.gram)
        ridge = self._settings.ridge * proxies.gram.diagonal().mean()
        factor = torch.linalg.cholesky(proxies.gram + ridge * torch.eye(size, dtype=proxies.gram.dtype))
        half = torch.linalg.solve_triangular(factor, real.gram, upper=False)
        whitened = torch.linalg.solve_triangular(factor, half.T, upper=False)
        values = torch.linalg.eigvalsh((whitened + whitened.T) / 2)
        middle, high, top = (float(values.quantile(share)) for share in (0.5, 0.95, 1.0))
        excess = self._excess(layer, proxies, real) if enough else None
        return Cover(layer.name, float(cosine), (middle, high, top), excess)

    def _excess(self, layer: Layer, proxies: Problem, real: Problem) -> float:
        blocks = blocks_of(layer, *self._axes(layer))
        fitted, best = (
            solve(layer, problem, blocks, self._settings.ridge, self._settings.min_rows)
            for problem in (proxies, real)
        )
        floor = _EXACT * float(real.target.sum())
        error = max(_error(fitted.weight, fitted.bias, real), floor)
        return error / max(_error(best.weight, best.bias, real), floor) - 1


def _error(weight: Tensor, bias: Tensor, problem: Problem) -> float:
    """E |W z + b - t|^2 over the images a problem was posed from, summed over outputs."""
    variance = (
        ((weight @ problem.gram) * weight).sum(1) - 2 * (weight * problem.cross).sum(1) + problem.target
    )
    offset = weight @ problem.mean_in + bias - problem.mean_out
    return float((variance + offset.square()).sum())
