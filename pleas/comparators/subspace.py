"""Task vectors of a layer as matrices: their singular vectors, spectra and row spaces.

Published for the matrices of transformers. Here a convolution is one too, unfolded to (d_out, d_in k k); vectors, and
tensors of one row or column, are averaged, as published for what is no matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pleas.comparators.comparator import State
from pleas.comparators.one_size import Ranges
from pleas.comparators.vectors import FromBase, Tasks, Vectors, each, largest


def by_matrix(vectors: Vectors, merge: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Matrices by `merge`, (parents, rows, columns) -> (rows, columns); the mean of everything else."""

    def one(values: Tensor) -> Tensor:
        if not is_matrix(values[0]) or not bool(values.any()):
            return values.mean(0)
        return merge(values.flatten(2)).view(values.shape[1:])

    return each(vectors, one)


def is_matrix(value: Tensor) -> bool:
    return value.dim() >= 2 and min(value.flatten(1).shape) > 1


@dataclass(frozen=True)
class IsoC(FromBase):
    """The sum of task vectors with all singular values at their mean (Iso-C, arXiv 2502.04959).

    scale: of the merged task vector
    """

    title: ClassVar[str] = "Iso-C"
    ranges: ClassVar[Ranges] = {"scale": (0, 10)}
    scale: float = 1.0

    def combine(self, tasks: Tasks) -> State:
        return {name: self.scale * value for name, value in iso_c(tasks.vectors).items()}


def iso_c(vectors: Vectors) -> dict[str, Tensor]:
    """U diag(mean s) V^T of the sum U diag(s) V^T."""

    def merge(values: Tensor) -> Tensor:
        u, s, vh = torch.linalg.svd(values.sum(0), full_matrices=False)
        return s.mean() * u @ vh

    return by_matrix(vectors, merge)


@dataclass(frozen=True)
class TsvMerge(FromBase):
    """The first singular vectors of every task, made orthogonal to each other (TSV-Merge, arXiv 2412.00081).

    scale: of the merged task vector
    """

    title: ClassVar[str] = "TSV-Merge"
    ranges: ClassVar[Ranges] = {"scale": (0, 10)}
    scale: float = 1.0

    def combine(self, tasks: Tasks) -> State:
        return {name: self.scale * value for name, value in tsv(tasks.vectors).items()}


def tsv(vectors: Vectors) -> dict[str, Tensor]:
    """Of N tasks floor(rank / N) singular triples each, side by side; the nearest orthogonal U and V.

    Matrices of a rank below the number of tasks are averaged.
    """

    def merge(values: Tensor) -> Tensor:
        u, s, vh = leading(values, 1 / len(values))
        if not len(s):
            return values.mean(0)
        return nearest_orthogonal(u) @ torch.diag(s) @ nearest_orthogonal(vh)

    return by_matrix(vectors, merge)


def leading(values: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """The first floor(share * rank) singular triples of every matrix, side by side: U, s, V^T."""
    parts = [torch.linalg.svd(value, full_matrices=False) for value in values]
    count = int(len(parts[0][1]) * share)
    return (
        torch.cat([u[:, :count] for u, _, _ in parts], 1),
        torch.cat([s[:count] for _, s, _ in parts]),
        torch.cat([vh[:count] for _, _, vh in parts]),
    )


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """P Q^T of the singular value decomposition P S Q^T (Procrustes)."""
    p, _, qh = torch.linalg.svd(matrix, full_matrices=False)
    return p @ qh


@dataclass(frozen=True)
class Wudi(FromBase):
    """The task vector whose difference from each lies least in that one's row space (WUDI, arXiv 2503.08099).

    Minimises sum_p ||(v - v_p) v_p^T||^2 / ||v_p||^2 from v = sum_p v_p, by Adam.

    steps, rate: of Adam, as published
    """

    title: ClassVar[str] = "WUDI"
    ranges: ClassVar[Ranges] = {"steps": (0, 10**6), "rate": (0, 1)}
    steps: int = 300
    rate: float = 1e-5

    def combine(self, tasks: Tasks) -> State:
        return wudi(tasks.vectors, self.steps, self.rate)


def wudi(vectors: Vectors, steps: int, rate: float) -> dict[str, Tensor]:
    """The minimum is not reached: as published, so many steps of so small a rate."""

    def merge(values: Tensor) -> Tensor:
        sizes = values.square().sum((1, 2), keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)

        def gradient(merged: Tensor) -> Tensor:
            return (2 * (merged - values) @ values.mT @ values / sizes).sum(0)

        return adam(values.sum(0), gradient, steps, rate)

    return by_matrix(vectors, merge)


def adam(start: Tensor, gradient: Callable[[Tensor], Tensor], steps: int, rate: float) -> Tensor:
    """So many steps of Adam along a gradient that is written down."""
    point = start.clone()
    optimiser = torch.optim.Adam([point], lr=rate)
    for _ in range(steps):
        point.grad = gradient(point)
        optimiser.step()
    return point


@dataclass(frozen=True)
class Doge(FromBase):
    """Task vectors moved together out of what they share, largest entries scaled (DOGE, arXiv 2501.01230).

    With l_p = size / ||v_p|| in every layer: d minimises sum_p ||rows of v_p * (v_p - sum_q l_q (v_q + d))||^2 by Adam,
    its gradient projected off the first left singular vectors of all tasks; sum_p l_p keep(v_p + d) is merged.

    size:        norm of a scaled task vector in a layer
    subspace:    one over the share of directions that count as shared
    keep:        share of a task vector's entries that is kept, over all matrices
    steps, rate: of Adam, as published
    """

    title: ClassVar[str] = "DOGE TA"
    ranges: ClassVar[Ranges] = {
        "size": (0, 1000),
        "subspace": (1, 10**6),
        "keep": (0, 1),
        "steps": (0, 10**6),
        "rate": (0, 1),
    }
    size: float = 0.07
    subspace: int = 6
    keep: float = 0.3
    steps: int = 400
    rate: float = 1e-4

    def combine(self, tasks: Tasks) -> State:
        matrices = {
            name: torch.stack([vector[name] for vector in tasks.vectors]).flatten(2)
            for name, base in tasks.base.items()
            if is_matrix(base)
        }
        merged = each(tasks.vectors, lambda values: values.mean(0))
        if not matrices:
            return merged
        kept = largest(torch.cat([values.flatten(1) for values in matrices.values()], 1), self.keep)
        masks = kept.split([values[0].numel() for values in matrices.values()], 1)
        for (name, values), mask in zip(matrices.items(), masks, strict=True):
            found = doge(values, mask.view_as(values), self)
            merged[name] = found.view_as(merged[name])
        return merged


def doge(values: Tensor, mask: Tensor, settings: Doge) -> Tensor:
    """One matrix: values and mask (parents, rows, columns) -> (rows, columns)."""
    tiny = torch.finfo(values.dtype).tiny
    scales = settings.size / values.square().sum((1, 2), keepdim=True).sqrt().clamp(min=tiny)
    scales = torch.where(values.any(2, keepdim=True).any(1, keepdim=True), scales, 0)
    u, _, _ = leading(values, 1 / len(values))
    shared = torch.linalg.svd(u, full_matrices=False).U[:, : min(values.shape[1:]) // settings.subspace]
    apart = values * (values - (scales * values).sum(0))

    def gradient(moved: Tensor) -> Tensor:
        rows = (apart - scales.sum() * values * moved).sum(2, keepdim=True)
        found = (-2 * scales.sum() * rows * values).sum(0)
        return found - shared @ (shared.mT @ found)

    moved = adam(torch.zeros_like(values[0]), gradient, settings.steps, settings.rate)
    return (scales * (values + moved) * mask).sum(0)
