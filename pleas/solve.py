"""Normal equations -> layer: the closed-form least squares of PLeaS (arXiv 2407.02447, eq. 3) for any plan.

The parents' layers are linear in `u = [a; b]`, so the merged inputs are `z = S u` and the targets `t = T u +
c`; hence `Cov(z) = S Cov(u) S^T` and `Cov(t, z) = T Cov(u) S^T` come from the statistics alone, for any plan
and ridge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pleas.errors import SingularGram, TooFewRows
from pleas.layers import Layer
from pleas.layout import A_ONLY, B_ONLY, FUSED, Layout
from pleas.moments import Moments


@dataclass(frozen=True)
class Block:
    """Output positions that share one set of input positions; the rest of their weights are structurally
    zero."""

    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class LayerSolution:
    """A solved layer and the evidence for it.

    weight:   (out, d_in) canonical layout over merged positions, structural zeros included (grouped: one
        group's inputs)
    bias:     (out,)
    mean, variance: (out,) of the layer's output on the proxies, as predicted from the moments
    residual: (out,) predicted E (W z + b - t)^2
    target:   (out,) variance of the target
    rows:     rows the moments were made of
    dead:     input positions without variance; they keep the partial-merge weights
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor
    residual: Tensor
    target: Tensor
    rows: int
    dead: Tensor

    @property
    def relative_residual(self) -> float:
        """Predicted residual over the target's variance, summed over units."""
        return float(self.residual.sum() / self.target.sum().clamp_min(torch.finfo(torch.float64).tiny))


def blocks_of(layer: Layer, inputs: Layout, outputs: Layout) -> tuple[Block, ...]:
    """Which merged outputs read which merged inputs (design 5): A-only rows see [A-only | fused], B-only rows
    [fused | B-only], fused rows everything. One block where nothing is structurally zero."""
    everything = torch.arange(inputs.size)
    if layer.groups > 1 or not inputs.widened:
        return (Block(torch.arange(outputs.size), everything),)
    seen = {A_ONLY: (A_ONLY, FUSED), FUSED: (A_ONLY, FUSED, B_ONLY), B_ONLY: (FUSED, B_ONLY)}
    blocks = [Block(outputs.positions(kind), inputs.positions(*kinds)) for kind, kinds in seen.items()]
    return tuple(block for block in blocks if len(block.rows) and len(block.columns))


def mixing(layout: Layout) -> tuple[Tensor, Tensor]:
    """Coefficients of A's and B's unit in every merged unit: fused (1/2, 1/2), A-only (1, 0), B-only (0,
    1)."""
    half = torch.where(layout.kind == FUSED, 0.5, 0.0).double()
    return half + (layout.kind == A_ONLY), half + (layout.kind == B_ONLY)


def partial_merge(a: Tensor, b: Tensor, inputs: Layout, outputs: Layout) -> Tensor:
    """The weights before least squares (design 5, reference notes 1b): (out, taps, in) from aligned parents'
    (o, taps, i).

    Fused rows: mean of the parents' weights on fused inputs, half of each parent's on its own units. A-only
        rows: A's weights on what they see. Rows of A never read units of B.
    """
    weight_a = a[_rows(outputs, a)][:, :, _columns(inputs, a)]
    weight_b = b[_rows(outputs, b)][:, :, _columns(inputs, b)]
    row_a, row_b = (part[:, None, None] for part in mixing(outputs))
    reads_a, reads_b = inputs.kind != B_ONLY, inputs.kind != A_ONLY
    return row_a * weight_a * reads_a + row_b * weight_b * reads_b


def _rows(layout: Layout, parent: Tensor) -> Tensor:
    # A head of the other parent may have no such position here: its coefficient is zero, any row will do.
    return layout.source.clamp_max(parent.shape[0] - 1)


def _columns(layout: Layout, parent: Tensor) -> Tensor:
    return layout.source.clamp_max(parent.shape[2] - 1)


@dataclass(frozen=True)
class Problem:
    """One layer's least-squares problem in the aligned frame, ready for any ridge.

    gram:  (d, d) Cov(z)         cross: (out, d) Cov(t, z)        target: (out,) Var(t)
    mean_in: (d,) E z            mean_out: (out,) E t             prior: (out, d) partial-merge weights
    """

    gram: Tensor
    cross: Tensor
    target: Tensor
    mean_in: Tensor
    mean_out: Tensor
    prior: Tensor
    prior_bias: Tensor
    rows: int


def pose(
    layer: Layer,
    moments: Moments,
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    alignment: Tensor,
    inputs: Layout,
    outputs: Layout,
) -> Problem:
    """The normal equations of an ungrouped layer for the plan behind `inputs` and `outputs`.

    a, b:      weight (o, d_in) and bias (o,) of each parent, B aligned to A on both sides
    alignment: (channels,) B's own input position at each aligned position; the moments are in B's own order
    """
    taps, channels = layer.taps, layer.channels
    covariance, mean = moments.covariance[0], moments.mean[0]
    offsets = torch.arange(taps)[:, None] * channels
    index_a = (offsets + inputs.source).flatten()
    index_b = taps * channels + (offsets + alignment[inputs.source]).flatten()
    mix_a, mix_b = (part.repeat(taps) for part in mixing(inputs))

    def merge_columns(matrix: Tensor) -> Tensor:
        return matrix[:, index_a] * mix_a + matrix[:, index_b] * mix_b

    covariance_uz = merge_columns(covariance)
    gram = merge_columns(covariance_uz.T)
    row_a, row_b = mixing(outputs)
    own_b = taps * channels + (offsets + alignment).flatten()
    part_a = row_a[:, None] * a[0][outputs.source.clamp_max(len(a[0]) - 1)]
    part_b = row_b[:, None] * b[0][outputs.source.clamp_max(len(b[0]) - 1)]
    own_a = torch.arange(taps * channels)
    cross = part_a @ covariance_uz[own_a] + part_b @ covariance_uz[own_b]
    target = _quadratic(part_a, covariance[: len(own_a), : len(own_a)])
    target = target + _quadratic(part_b, covariance[own_b][:, own_b])
    target = target + 2 * ((part_a @ covariance[: len(own_a)][:, own_b]) * part_b).sum(1)
    bias = (
        row_a * a[1][outputs.source.clamp_max(len(a[1]) - 1)]
        + row_b * b[1][outputs.source.clamp_max(len(b[1]) - 1)]
    )
    mean_out = part_a @ mean[own_a] + part_b @ mean[own_b] + bias
    prior = partial_merge(a[0].unflatten(1, (taps, -1)), b[0].unflatten(1, (taps, -1)), inputs, outputs)
    mean_in = merge_columns(mean[None])[0]
    return Problem(gram, cross, target, mean_in, mean_out, prior.flatten(1), bias, moments.count)


def _quadratic(rows: Tensor, matrix: Tensor) -> Tensor:
    """diag(R M R^T)"""
    return ((rows @ matrix) * rows).sum(1)


def solve(
    layer: Layer, problem: Problem, blocks: tuple[Block, ...], ridge: float, min_rows: float
) -> LayerSolution:
    """Minimise `E|W z + b - t|^2 + ridge * mean(diag Cov z) * |W - prior|^2` block by block.

    A layer without a bias of its own is solved about the origin instead of about the mean.
    Raises TooFewRows, SingularGram.
    """
    check_rows(layer, problem.rows, len(problem.gram), min_rows)
    intercept = layer.bias is not None or layer.norm is not None
    gram, cross = problem.gram, problem.cross
    if not intercept:
        gram = gram + torch.outer(problem.mean_in, problem.mean_in)
        cross = cross + torch.outer(problem.mean_out, problem.mean_in)
    weight = torch.zeros_like(problem.prior)
    channels = len(problem.gram) // layer.taps
    for block in blocks:
        columns = (torch.arange(layer.taps)[:, None] * channels + block.columns).flatten()
        solution = ridge_solve(
            gram[columns][:, columns],
            cross[block.rows][:, columns],
            problem.prior[block.rows][:, columns],
            ridge,
            layer.name,
        )
        weight[block.rows[:, None], columns] = solution
    mean = weight @ problem.mean_in
    bias = problem.mean_out - mean if intercept else torch.zeros_like(mean)
    projected = weight @ problem.gram
    variance = (projected * weight).sum(1)
    residual = variance - 2 * (weight * problem.cross).sum(1) + problem.target
    residual = residual + (mean + bias - problem.mean_out).square()
    dead = dead_positions(problem.gram.diagonal().unflatten(0, (layer.taps, -1)).sum(0))
    return LayerSolution(
        weight, bias, mean + bias, variance, residual.clamp_min(0), problem.target, problem.rows, dead
    )


def check_rows(layer: Layer, rows: int, unknowns: int, min_rows: float) -> None:
    """Refuse a layer whose rows are too few even with the ridge's help."""
    if rows < min_rows * unknowns:
        needed = int(min_rows * unknowns) + 1
        raise TooFewRows(
            f"layer '{layer.name}': {rows} rows for {unknowns} unknowns per output (rank at most {rows}, at least "
            f"{needed} rows are required). Give more proxy images, raise positions, or lower min_rows to lean on "
            "the ridge."
        )


def ridge_solve(gram: Tensor, cross: Tensor, prior: Tensor, ridge: float, name: str = "layer") -> Tensor:
    """Ridge regression towards a prior, from second moments.

    Minimises `tr(W G W^T) - 2 tr(W C^T) + ridge * mean(diag G) * |W - prior|_F^2` (PLeaS, eq. 3, plus a
    prior).

    gram:  (..., d_in, d_in) float64      cross: (..., d_out, d_in) float64      prior: (..., d_out, d_in)
    ridge: dimensionless, > 0
    Returns (..., d_out, d_in). Raises SingularGram when the damped matrix is not positive definite.
    """
    level = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    damping = ridge * torch.where(level > 0, level, 1.0)
    damped = gram + torch.diag_embed(damping[..., None].expand(gram.shape[:-1]))
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed.any()):
        raise SingularGram(
            f"layer '{name}': its damped Gram matrix is not positive definite (ridge {ridge:g}, mean "
            f"diagonal {float(level.mean()):g}). Raise the ridge or give more varied proxy images."
        )
    right = cross + damping[..., None, None] * prior
    return torch.cholesky_solve(right.mT, factor).mT


def dead_positions(variance: Tensor, relative: float = 1e-12) -> Tensor:
    """Positions whose variance is nil against the largest one."""
    return (variance <= relative * variance.max()).nonzero()[:, 0]


def solve_grouped(
    layer: Layer,
    moments: Moments,
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    inputs: Layout,
    outputs: Layout,
    ridge: float,
    min_rows: float,
) -> LayerSolution:
    """A grouped or depthwise layer: every merged group is one small problem; groups kept apart keep their
    weights exactly.

    moments: (groups, 2 d_in) with B already aligned. a, b as in `pose`.
    """
    d = layer.d_in
    check_rows(layer, moments.count, d, min_rows)
    per_in, per_out = layer.channels // layer.groups, layer.out_units // layer.groups
    group = (outputs.source // per_out)[::per_out]
    kind = outputs.kind[::per_out]
    if not torch.equal((inputs.source // per_in)[::per_in], group):
        raise SingularGram(
            f"layer '{layer.name}': its input and output groups were widened differently (internal error)"
        )
    covariance, mean = moments.covariance[group], moments.mean[group]
    weight_a, weight_b = (w.unflatten(0, (layer.groups, per_out))[group] for w in (a[0], b[0]))
    bias_a, bias_b = (w.unflatten(0, (layer.groups, per_out))[group] for w in (a[1], b[1]))
    mix_a = torch.where(kind == FUSED, 0.5, (kind == A_ONLY).double())[:, None, None]
    mix_b = 1 - mix_a
    mixed_in = torch.cat([torch.eye(d).double() * mix_a, torch.eye(d).double() * mix_b], -1)  # (g, d, 2d)
    mixed_out = torch.cat([weight_a * mix_a, weight_b * mix_b], -1)  # (g, o, 2d)
    gram = mixed_in @ covariance @ mixed_in.mT
    cross = mixed_out @ covariance @ mixed_in.mT
    target = ((mixed_out @ covariance) * mixed_out).sum(-1)
    mean_in = (mixed_in @ mean[:, :, None])[..., 0]
    bias = bias_a * mix_a[..., 0] + bias_b * mix_b[..., 0]
    mean_out = (mixed_out @ mean[:, :, None])[..., 0] + bias
    prior = weight_a * mix_a + weight_b * mix_b
    intercept = layer.bias is not None or layer.norm is not None
    shift = 0 if intercept else 1
    weight = ridge_solve(
        gram + shift * mean_in[:, :, None] * mean_in[:, None, :],
        cross + shift * mean_out[:, :, None] * mean_in[:, None, :],
        prior,
        ridge,
        layer.name,
    )
    weight = torch.where((kind == FUSED)[:, None, None], weight, prior)
    mean_wz = (weight @ mean_in[:, :, None])[..., 0]
    solved_bias = mean_out - mean_wz if intercept else torch.zeros_like(mean_wz)
    variance = ((weight @ gram) * weight).sum(-1)
    residual = variance - 2 * (weight * cross).sum(-1) + target + (mean_wz + solved_bias - mean_out).square()
    dead = dead_positions(gram.diagonal(dim1=-2, dim2=-1).unflatten(1, (layer.taps, -1)).sum(1).flatten())
    return LayerSolution(
        weight=weight.flatten(0, 1),
        bias=solved_bias.flatten(),
        mean=(mean_wz + solved_bias).flatten(),
        variance=variance.flatten(),
        residual=residual.clamp_min(0).flatten(),
        target=target.flatten(),
        rows=moments.count,
        dead=dead,
    )
