"""Which entries of which task vector count: by competition, by consensus, by rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pleas.comparators.comparator import State
from pleas.comparators.one_size import Ranges
from pleas.comparators.vectors import FromBase, Tasks, Vectors, whole

EXTREME = 1e-4  # share of a task vector's entries at either end that PCB clips


@dataclass(frozen=True)
class PcbMerging(FromBase):
    """Task vectors averaged by how large an entry is within and how it fits across them (PCB, arXiv 2410.02396).

    b_p = exp(N norm(|v_p|)^2) * tanh(v_p * sum_q v_q), its largest `keep` scaled to [0, 1]; sum b_p v_p / sum b_p.

    keep:  share of entries of a task vector with a weight above 0
    scale: of the merged task vector
    """

    title: ClassVar[str] = "PCB-Merging"
    ranges: ClassVar[Ranges] = {"keep": (0, 1), "scale": (0, 10)}
    keep: float = 0.1
    scale: float = 1.0

    def combine(self, tasks: Tasks) -> State:
        return pcb(tasks.vectors, self.keep, self.scale)


def pcb(vectors: Vectors, keep: float, scale: float) -> dict[str, Tensor]:
    """Parameter competition balancing: intra times inter, the lowest dropped, as weights of a mean."""

    def merge(flat: Tensor) -> Tensor:
        sizes = _clipped(flat.abs(), EXTREME, EXTREME)
        within = torch.exp(len(flat) * _normalised(sizes).square())
        across = torch.tanh(flat * flat.sum(0))
        weights = _normalised(_clipped(within * across, 1 - keep, 0.0))
        return scale * (flat.sign() * sizes * weights).sum(0) / weights.sum(0).clamp(min=1e-12)

    return whole(vectors, merge)


def _clipped(rows: Tensor, low: float, high: float) -> Tensor:
    """Every row between its entry of rank floor(low d) and that of rank floor((1 - high) d - 1)."""
    size, ordered = rows.shape[1], rows.sort(1).values
    least, most = min(int(size * low), size - 1), max(int(size * (1 - high) - 1), 0)
    return rows.clamp(ordered[:, least, None], ordered[:, most, None])


def _normalised(rows: Tensor) -> Tensor:
    """Every row from 0 to 1; all 0 where it is constant."""
    least, most = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    return (rows - least) / (most - least).clamp(min=torch.finfo(rows.dtype).tiny)


@dataclass(frozen=True)
class Consensus(FromBase):
    """The sum of task vectors where it serves several tasks (Consensus of TALL masks, arXiv 2405.07813).

    An entry of the sum s serves parent p where |v_p| > threshold * |s - v_p|.

    threshold: published as chosen from 0.2 to 0.6, of which this is the middle
    agree:     parents that an entry has to serve to be kept
    scale:     of what is kept
    """

    title: ClassVar[str] = "Consensus TA"
    ranges: ClassVar[Ranges] = {"threshold": (0, 100), "agree": (0, 10**6), "scale": (0, 10)}
    threshold: float = 0.4
    agree: int = 2
    scale: float = 0.3

    def combine(self, tasks: Tasks) -> State:
        return consensus(tasks.vectors, self.threshold, self.agree, self.scale)


def consensus(vectors: Vectors, threshold: float, agree: int, scale: float) -> dict[str, Tensor]:
    """The scaled sum, 0 where fewer than `agree` TALL masks are on."""

    def merge(flat: Tensor) -> Tensor:
        summed = flat.sum(0)
        serves = flat.abs() > threshold * (summed - flat).abs()
        return scale * summed * (serves.sum(0) >= agree)

    return whole(vectors, merge)


@dataclass(frozen=True)
class Widen(FromBase):
    """Task vectors weighted by how much they turn and stretch each input's weights (WIDEN, arXiv 2408.03092).

    above: an input that ranks above this multiple of its parent's mean counts in full
    full:  what counting in full is
    """

    title: ClassVar[str] = "WIDEN"
    ranges: ClassVar[Ranges] = {"above": (0, 100), "full": (0, 10)}
    above: float = 1.0
    full: float = 1.0

    def combine(self, tasks: Tasks) -> State:
        return {
            name: widen(base, torch.stack([vector[name] for vector in tasks.vectors]), self.above, self.full)
            for name, base in tasks.base.items()
        }


def widen(base: Tensor, vectors: Tensor, above: float, full: float) -> Tensor:
    """The merged task vector of one tensor. base: (...), vectors: (parents, ...).

    Of a matrix (d_out, d_in) the columns are ranked, of a convolution unfolded to one; of a vector its entries, by the
    size of their change.
    """
    if base.dim() < 2:
        return (vectors * _importance(vectors.abs(), above, full)).sum(0)
    before, after = base.flatten(1), (base + vectors).flatten(2)
    stretched = (after.norm(dim=1) - before.norm(dim=0)).abs()
    turned = 1 - torch.cosine_similarity(after, before[None], dim=1)
    scores = [_importance(_ranks(change), above, full) for change in (stretched, turned)]
    weights = (scores[0] + scores[1]) / 2  # (parents, d_in)
    return (vectors.flatten(2) * weights[:, None]).sum(0).view_as(base)


def _ranks(rows: Tensor) -> Tensor:
    """(n, d) -> rank of every entry in its row over d: 0 the smallest, (d - 1) / d the largest."""
    return rows.argsort(dim=1, stable=True).argsort(dim=1, stable=True).to(rows.dtype) / rows.shape[1]


def _importance(significance: Tensor, above: float, full: float) -> Tensor:
    """Softmax over parents; `full` where an entry is above its row's mean."""
    scores = significance.softmax(0)
    return torch.where(significance > above * significance.mean(1, keepdim=True), full, scores)
