"""Correlations of units on the same inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from pleas.matching.assign import AxisName
from pleas.statistics.collect import Statistics

DEAD = 1e-12  # relative variance below which a unit is constant


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
