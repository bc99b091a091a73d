"""How many images are enough: as many as it takes for the second moments to settle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import pleas
from datafree.proxy.build import ProxySet, ProxySpec


@dataclass(frozen=True)
class Settled:
    """How the moments moved while the number of images doubled.

    images:  the smallest number tried at which every layer had settled, or the largest when none was enough
    changes: per number of images, layer -> relative change of the covariance since half as many
    """

    images: int
    settled: bool
    changes: dict[int, dict[str, float]]

    def worst(self, images: int) -> tuple[str, float]:
        """The layer that moved most on the way to `images`, and how much."""
        layer = max(self.changes[images], key=lambda name: self.changes[images][name])
        return layer, self.changes[images][layer]


def images_until_settled(
    spec: ProxySpec,
    make: Callable[[ProxySpec], ProxySet],
    collect: Callable[[Sequence[Tensor], int, int], pleas.Statistics],
    start: int = 128,
    tolerance: float = 0.1,
) -> Settled:
    """Double the number of images, from `start` to `spec.count` at most, until no layer's moments move much.

    A layer has settled when |Cov(n) - Cov(n/2)|_F <= tolerance * |Cov(n)|_F for the joint covariance of all
    parents' units. Sampling alone moves a covariance of n independent rows by about sqrt(erank / n), so a
    tolerance far below 0.1 asks for very many images.

    make:    builds the proxies of a spec; images that exist are not made again
    collect: statistics of a list of uint8 batches, given the index of their first image and `spec.count`
    """
    changes: dict[int, dict[str, float]] = {}
    count = min(start, spec.count)
    batches = list(make(spec.model_copy(update={"count": count})).batches(64))
    statistics = collect(batches, 0, spec.count)
    while count < spec.count:
        doubled = min(2 * count, spec.count)
        proxies = make(spec.model_copy(update={"count": doubled}))
        more = collect(list(_from(proxies, count)), count, spec.count)
        total = statistics + more
        changes[doubled] = _changes(statistics, total)
        statistics, count = total, doubled
        if max(changes[doubled].values(), default=0.0) <= tolerance:
            return Settled(count, True, changes)
    return Settled(count, False, changes)


def _from(proxies: ProxySet, first: int) -> Iterator[Tensor]:
    for start in range(first, len(proxies), 64):
        yield proxies.batch(range(start, min(start + 64, len(proxies))))


def _changes(before: pleas.Statistics, after: pleas.Statistics) -> dict[str, float]:
    found: dict[str, float] = {}
    for site, moments in after.units.items():
        new, old = moments.covariance, before.units[site].covariance
        moved = float(torch.linalg.norm(new - old) / torch.linalg.norm(new).clamp_min(1e-30))
        name = site[0].rpartition(".")[0]
        found[name] = max(moved, found.get(name, 0.0))
    return found
