"""Layers too wide for second moments (VGG's first linear layer reads 25,088 inputs): their rows are kept instead.

With n rows and n far below d_in, ridge regression is solved in its dual form, over rows: the same minimum as
`pleas.solve.ridge_solve`, from an n x n instead of a d_in x d_in matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pleas.errors import SingularGram
from pleas.layers import Layer
from pleas.layout import Layout
from pleas.solve import Block, LayerSolution, check_rows, dead_positions, mixing, partial_merge

MAX_INPUTS = 6000  # d_in above which rows are kept: joint moments of 12,000 numbers take 1.2 GB in float64
MAX_ROWS = 4096  # rows kept at most, the first ones seen


@dataclass
class Rows:
    """The first rows `[a; b]` of a layer, both parents in their own unit order: (count, 2 d_in) float32."""

    width: int
    parts: list[Tensor] = field(default_factory=list)
    count: int = 0

    def add(self, rows: Tensor) -> None:
        """Keep rows (n, 2 d_in) until there are MAX_ROWS."""
        wanted = rows[: MAX_ROWS - self.count]
        if len(wanted):
            self.parts.append(wanted.float().cpu())
            self.count += len(wanted)

    def __add__(self, other: Rows) -> Rows:
        total = Rows(self.width)
        for part in (*self.parts, *other.parts):
            total.add(part)
        return total

    def halves(self) -> tuple[Tensor, Tensor]:
        """A's and B's rows, (count, d_in) each."""
        joined = torch.cat(self.parts)
        return joined[:, : self.width], joined[:, self.width :]


def is_wide(layer: Layer) -> bool:
    """A linear layer whose rows are kept. Convolutions always have joint moments: they have many rows per image."""
    return not layer.is_convolution and layer.d_in > MAX_INPUTS


def output_covariance(rows: Rows, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Variances of A's and B's outputs and their cross-covariance, from weights (o, d_in) in the parents' own order."""
    outputs = [half @ w.float().T for half, w in zip(rows.halves(), (a, b), strict=True)]
    ya, yb = ((y - y.mean(0)).double() for y in outputs)
    return ya.square().mean(0), ya.T @ yb / rows.count, yb.square().mean(0)


def position_costs(rows: Rows, a: Tensor, b: Tensor, alignment: Tensor) -> Tensor:
    """What fusing each input position costs the layer's outputs, relative to their variance: (d_in,).

    Unlike `pleas.plan.fusing_costs` it does not credit what other inputs could make up for.
    """
    half_a, half_b = rows.halves()
    lost = (half_a - half_b[:, alignment]).var(0, unbiased=False).double() / 4
    var_a, _, var_b = output_covariance(rows, a, b[:, alignment.argsort()])
    weight = a.square().sum(0) + b.square().sum(0)
    return weight * lost / (var_a.sum() + var_b.sum()).clamp_min(torch.finfo(torch.float64).tiny)


def solve_rows(
    layer: Layer,
    rows: Rows,
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    alignment: Tensor,
    inputs: Layout,
    outputs: Layout,
    blocks: tuple[Block, ...],
    ridge: float,
    min_rows: float,
) -> LayerSolution:
    """Least squares of a linear layer over its rows; arguments as in `pleas.solve.pose` and `pleas.solve.solve`.

    Fewer rows than unknowns are the rule here, so min_rows counts against MAX_ROWS.
    """
    check_rows(layer, rows.count, min(layer.d_in, MAX_ROWS), min_rows)
    half_a, half_b = rows.halves()
    mix_a, mix_b = mixing(inputs)
    z = half_a[:, inputs.source] * mix_a.float() + half_b[:, alignment[inputs.source]] * mix_b.float()
    row_a, row_b = mixing(outputs)
    whole_a = half_a @ a[0].float().T + a[1].float()
    whole_b = half_b[:, alignment] @ b[0].float().T + b[1].float()
    source = [outputs.source.clamp_max(whole.shape[1] - 1) for whole in (whole_a, whole_b)]
    t = (whole_a[:, source[0]] * row_a + whole_b[:, source[1]] * row_b).double()
    intercept = layer.bias is not None or layer.norm is not None
    mean_in = z.mean(0).double() if intercept else torch.zeros(z.shape[1], dtype=torch.float64)
    mean_out = t.mean(0) if intercept else torch.zeros(t.shape[1], dtype=torch.float64)
    z = z - mean_in.float()
    prior = partial_merge(a[0].unflatten(1, (1, -1)), b[0].unflatten(1, (1, -1)), inputs, outputs).flatten(1)
    weight = torch.zeros_like(prior)
    for block in blocks:
        part, own = z[:, block.columns], prior[block.rows][:, block.columns]
        left = (t - mean_out)[:, block.rows] - (part @ own.T.float()).double()
        weight[block.rows[:, None], block.columns] = own + _dual_ridge(part, left, ridge, layer.name)
    predicted = (z @ weight.T.float()).double()
    residual = (predicted - (t - mean_out)).square().mean(0)
    bias = mean_out - weight @ mean_in if intercept else torch.zeros_like(mean_out)
    variance = predicted.var(0, unbiased=False)
    dead = dead_positions(z.square().mean(0))
    target = t.var(0, unbiased=False)
    mean = predicted.mean(0) + mean_out
    return LayerSolution(weight, bias, mean, variance, residual, target, rows.count, dead)


def _dual_ridge(z: Tensor, left: Tensor, ridge: float, name: str) -> Tensor:
    """Z^T (Z Z^T + n damping)^-1 R, transposed: the step from the prior that minimises the ridge objective.

    z: (n, d) float32, left: (n, o) float64. Returns (o, d) float64.
    """
    kernel = (z @ z.T).double() / len(z)
    level = kernel.diagonal().sum() / z.shape[1]  # the mean diagonal of the d x d Gram matrix
    damping = ridge * torch.where(level > 0, level, 1.0)
    factor, failed = torch.linalg.cholesky_ex(kernel + damping * torch.eye(len(z), dtype=torch.float64))
    if bool(failed):
        raise SingularGram(
            f"layer '{name}': its damped kernel matrix is not positive definite. Raise the ridge."
        )
    return (z.T.double() @ torch.cholesky_solve(left, factor) / len(z)).T
