"""Slow, obvious oracles: what the fast code is compared with."""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor
from torch.nn import functional as F


def covariance_by_loop(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of rows (n, d), one row at a time in float64."""
    rows = rows.double()
    mean = torch.zeros(rows.shape[1], dtype=torch.float64)
    for row in rows:
        mean += row / len(rows)
    second = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for row in rows:
        second += torch.outer(row - mean, row - mean) / len(rows)
    return mean, second


def rows_by_unfold(
    x: Tensor, kernel: tuple[int, int], stride: int, padding: int, dilation: int = 1
) -> Tensor:
    """Every input row of a convolution, (N * positions, taps * channels), tap outermost."""
    unfolded = F.unfold(x, kernel, dilation, padding, stride)  # (N, C * taps, L), channel outermost
    n, _, places = unfolded.shape
    return unfolded.view(n, x.shape[1], -1, places).permute(0, 3, 2, 1).reshape(n * places, -1)


def assignment_by_enumeration(similarity: Tensor) -> float:
    """The greatest total similarity over all permutations."""
    n = len(similarity)
    return max(float(sum(similarity[i, p[i]] for i in range(n))) for p in permutations(range(n)))


def ridge_by_lstsq(
    z: Tensor,
    target: Tensor,
    prior: Tensor,
    damping: float,
    *,
    intercept: bool,
    allowed: Tensor | None = None,
) -> Tensor:
    """Ridge towards a prior as dense least squares on stacked rows, one output at a time.

    z: (n, d), target: (n, o), prior: (o, d); damping is absolute, relative to the mean squared error.
    allowed: (o, d) marks the weights that may differ from zero.
    """
    n, d = z.shape
    if intercept:
        z, target = z - z.mean(0), target - target.mean(0)
    out = torch.zeros_like(prior)
    for o in range(prior.shape[0]):
        free = torch.arange(d) if allowed is None else allowed[o].nonzero()[:, 0]
        stacked = torch.cat([z[:, free] / n**0.5, damping**0.5 * torch.eye(len(free), dtype=z.dtype)])
        right = torch.cat([target[:, o] / n**0.5, damping**0.5 * prior[o, free]])
        out[o, free] = torch.linalg.lstsq(stacked, right[:, None]).solution[:, 0]
    return out
