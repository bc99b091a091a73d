"""Streaming second moments: count, mean and covariance of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STRIP, STRIPS = 192, 8  # columns of a strip at least, strips at most


@dataclass
class Moments:
    """Count, mean and covariance of rows, accumulated in a stream; a leading dimension runs over a layer's
    groups.

    Products are taken in the rows' dtype per batch and summed in float64, about a shift close to the mean
    (the first batch's), so that float32 batches lose nothing to cancellation. Moments of shards add up
    exactly as if seen in one stream.
    """

    count: int
    shift: Tensor  # (groups, d) float64
    first: Tensor  # (groups, d) float64, sum of (row - shift)
    second: (
        Tensor  # (groups, d, d) float64, sum of (row - shift)(row - shift)^T; only the upper triangle counts
    )

    @classmethod
    def starting_at(cls, rows: Tensor) -> Moments:
        """Empty moments with the shift these rows suggest. rows: (groups, n, d)."""
        shift = rows.mean(1).double()
        zeros = torch.zeros_like(shift)
        return cls(0, shift, zeros, zeros.new_zeros((*shift.shape, shift.shape[-1])))

    def add(self, rows: Tensor) -> None:
        """Add a batch of rows (groups, n, d)."""
        centred = rows - self.shift.to(rows.dtype)[:, None]
        self.count += rows.shape[1]
        self.first += centred.sum(1, dtype=torch.float64)
        add_products(self.second, centred)

    def __add__(self, other: Moments) -> Moments:
        """Moments of both streams together."""
        moved = self.shift - other.shift  # (x - s') = (x - s) + (s - s')
        outer = moved[:, :, None] * other.first[:, None, :]
        square = moved[:, :, None] * moved[:, None, :]
        first = other.first - other.count * moved
        second = other.second - outer - outer.mT + other.count * square
        return Moments(self.count + other.count, self.shift, self.first + first, self.second + second)

    def cpu(self) -> Moments:
        """The same on the CPU, where everything after the pass is computed, in float64."""
        return Moments(self.count, self.shift.cpu(), self.first.cpu(), self.second.cpu())

    @property
    def mean(self) -> Tensor:
        """(groups, d)"""
        return self.shift + self.first / self.count

    @property
    def covariance(self) -> Tensor:
        """(groups, d, d)"""
        offset = self.first / self.count
        return symmetric(self.second) / self.count - offset[:, :, None] * offset[:, None, :]


def add_products(into: Tensor, rows: Tensor) -> None:
    """Add `X^T X` of rows (groups, n, d) to the upper triangle of `into` (groups, d, d); what lies below is undefined.

    Products are symmetric: strips of the upper triangle cost little more than half of the full product.
    """
    width = rows.shape[-1]
    strip = max(STRIP, -(-width // STRIPS))
    for first in range(0, width, strip):
        last = min(first + strip, width)
        into[:, :last, first:last] += rows[:, :, :last].mT @ rows[:, :, first:last]


def symmetric(upper: Tensor) -> Tensor:
    """The matrices (..., d, d) of which only the upper triangle counts, in full."""
    upper = upper.triu()
    return upper + upper.triu(1).mT
