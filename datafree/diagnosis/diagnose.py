"""Knowing before merging how good the proxies are: per source, parent and layer, without labels, and better with a
few real images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

import pleas
from datafree.diagnosis.observe import Observation, Sums, agreement, watch
from datafree.diagnosis.spectra import Rank, ranks, shared_assignments
from datafree.errors import UsageError
from datafree.models.parent import Parent
from datafree.proxy.build import ProxySet
from pleas.coverage import Cover, cover

Progress = Callable[[str, int, int], None]  # stage, done, total


class Pictures(Protocol):
    """A set of images, such as a `ProxySet`."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int], /) -> Tensor:
        """The images at `indices`, (n, C, H, W), as the parents' preprocessing takes them."""
        ...


@dataclass(frozen=True)
class ParentScores:
    """One parent on one source's images, and on their two halves."""

    observation: Observation
    halves: tuple[Observation, Observation]
    ranks: tuple[Rank, ...]

    @property
    def effective_rank(self) -> float:
        """Mean over layers of the effective rank as a share of the layer's inputs."""
        return _mean([rank.effective / rank.size for rank in self.ranks])

    @property
    def dead(self) -> int:
        return sum(rank.dead for rank in self.ranks)

    @property
    def spread(self) -> float:
        """Entropy of the mean prediction as a share of the most it can be."""
        return self.observation.spread


@dataclass(frozen=True)
class SourceDiagnosis:
    """One source of a proxy set (or all together).

    stability:  share of units that two halves of the images match alike
    agreement:  share of images on which the parents predict the same class; None with separate labels
    cover:      against real images, layer by layer; None without them
    matched_as_real: share of units matched as the real images match them; None without them
    """

    name: str
    images: int
    seconds_per_1000: float | None
    parents: tuple[ParentScores, ...]
    stability: float
    agreement: float | None
    cover: tuple[Cover, ...] | None
    matched_as_real: float | None

    @property
    def bn_log_var(self) -> float | None:
        """Mean of the parents' distances; None where neither has batch norm."""
        return _known_mean([scores.observation.bn_log_var for scores in self.parents])

    @property
    def bn_mean(self) -> float | None:
        return _known_mean([scores.observation.bn_mean for scores in self.parents])

    @property
    def spread(self) -> float:
        return _mean([scores.spread for scores in self.parents])

    @property
    def effective_rank(self) -> float:
        return _mean([scores.effective_rank for scores in self.parents])

    @property
    def dead(self) -> int:
        return sum(scores.dead for scores in self.parents)

    @property
    def log_coverage(self) -> float | None:
        """Mean over layers of log10 of the 95th percentile of coverage; None without real images."""
        if not self.cover:
            return None
        return _mean([math.log10(max(layer.coverage[1], 1e-12)) for layer in self.cover])

    def half(self, number: int) -> dict[str, float | None]:
        """Spread and batch-norm log-variance distance of one half of the images."""
        seen = [scores.halves[number] for scores in self.parents]
        return {
            "spread": _mean([one.spread for one in seen]),
            "bn_log_var": _known_mean([one.bn_log_var for one in seen]),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, all layers included."""
        parents = {
            scores.observation.parent: {
                "bn_mean": scores.observation.bn_mean,
                "bn_log_var": scores.observation.bn_log_var,
                "entropy": scores.observation.entropy,
                "entropy_limit": scores.observation.entropy_limit,
                "effective_rank": scores.effective_rank,
                "dead_directions": scores.dead,
                "norms": [asdict(norm) for norm in scores.observation.norms],
                "layers": [asdict(rank) for rank in scores.ranks],
            }
            for scores in self.parents
        }
        return {
            "source": self.name,
            "images": self.images,
            "seconds_per_1000": self.seconds_per_1000,
            "match_stability": self.stability,
            "agreement": self.agreement,
            "matched_as_real": self.matched_as_real,
            "parents": parents,
            "real": None if self.cover is None else [asdict(layer) for layer in self.cover],
        }


def diagnose(
    proxies: ProxySet,
    parents: Sequence[Parent],
    networks: pleas.Parents,
    *,
    real: Tensor | None = None,
    batch: int = 64,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> list[SourceDiagnosis]:
    """Every source of `proxies`, and all of them together where there are several.

    real: uint8 (n, C, H, W), a few images of the parents' own kind, for the comparisons that need them
    Raises UsageError for a source of one image: scores are compared between halves.
    """
    place = device or torch.device("cpu")
    sets: list[tuple[str, ProxySet, float | None]] = [
        (f"{number + 1} {report.kind}", proxies.source(number), report.seconds_per_1000)
        for number, report in enumerate(proxies.manifest)
    ]
    for name, images, _ in sets:
        if len(images) < 2:
            raise UsageError(
                f"source {name} has {len(images)} image, but a diagnosis compares two halves: raise proxy.count"
            )
    if len(sets) > 1:
        sets.append(("all", proxies, None))
    known = None if real is None else Reference(real, parents, networks, batch, place)
    found = []
    for number, (name, images, seconds) in enumerate(sets):
        one = examine(name, images, parents, networks, seconds=seconds, real=known, batch=batch, device=place)
        found.append(one.diagnosis)
        if progress is not None:
            progress("diagnosis", number + 1, len(sets))
    return found


class Reference:
    """Statistics of the real images."""

    def __init__(
        self,
        images: Tensor,
        parents: Sequence[Parent],
        networks: pleas.Parents,
        batch: int,
        device: torch.device,
    ) -> None:
        self.inputs = list(_inputs(images.split(batch), parents, device))
        statistics = pleas.collect(networks, self.inputs, images=len(images))
        self.alignments = pleas.match(networks, statistics)


@dataclass(frozen=True)
class Examined:
    """A diagnosis and what it was computed from, for whoever goes on to merge."""

    diagnosis: SourceDiagnosis
    evidence: pleas.Evidence


def examine(
    name: str,
    images: Pictures,
    parents: Sequence[Parent],
    networks: pleas.Parents,
    *,
    seconds: float | None = None,
    real: Reference | None = None,
    batch: int = 64,
    device: torch.device | None = None,
) -> Examined:
    """One set of images by itself; the statistics are those of `pleas.collect` over all of it."""
    place = device or torch.device("cpu")
    total, middle = len(images), len(images) // 2
    halves = []
    # Not every other image: a split inversion deals its images to the parents in turn.
    bounds = ((0, middle), (middle, total))

    def half_of(first: int, last: int) -> Iterator[Tensor]:
        for start in range(first, last, batch):
            yield images.batch(range(start, min(start + batch, last)))

    for first, last in bounds:
        inputs = _inputs(half_of(first, last), parents, place)
        halves.append(pleas.collect(networks, inputs, first_image=first, images=total))
    matchings = [pleas.match(networks, half) for half in halves]
    statistics = halves[0] + halves[1]
    everything = _Batches(lambda: _inputs(half_of(0, total), parents, place), -(-total // batch))
    evidence = pleas.gather(networks, everything, statistics=statistics)
    seen = [[watch(parent, half_of(*half), place) for half in bounds] for parent in parents]
    whole = [(first + second).observation() for first, second in seen]
    ranked = ranks(networks, statistics)
    covered = None if real is None else tuple(cover(evidence, real.inputs))
    diagnosis = SourceDiagnosis(
        name=name,
        images=total,
        seconds_per_1000=seconds,
        parents=tuple(_scores(*one) for one in zip(whole, seen, ranked, strict=True)),
        stability=_alike(networks, *matchings),
        agreement=agreement(whole) if networks.settings.heads == "shared" else None,
        cover=covered,
        matched_as_real=None if real is None else _alike(networks, evidence.alignments, real.alignments),
    )
    return Examined(diagnosis, evidence)


def _alike(
    networks: pleas.Parents, one: Sequence[pleas.Permutation], two: Sequence[pleas.Permutation]
) -> float:
    """Share of units that both matchings pair alike, over the parents that were matched to the first."""
    pairs = list(zip(one[1:], two[1:], strict=True))
    return _mean([shared_assignments(networks.symmetry, *pair) for pair in pairs])


@dataclass(frozen=True)
class _Batches:
    """Batches that can be read again. make: a fresh run through them    count: how many"""

    make: Callable[[], Iterator[tuple[Tensor, ...]]]
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return self.make()


def _scores(whole: Observation, halves: Sequence[Sums], found: Sequence[Rank]) -> ParentScores:
    first, second = (half.observation() for half in halves)
    return ParentScores(whole, (first, second), tuple(found))


def _inputs(
    batches: Sequence[Tensor] | Iterator[Tensor], parents: Sequence[Parent], device: torch.device
) -> Iterator[tuple[Tensor, ...]]:
    """Each batch as every parent takes it."""
    own = [parent.preprocess for parent in parents]
    for images in batches:
        moved = images.to(device)
        first = own[0](moved)
        yield tuple(first if one == own[0] else one(moved) for one in own)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _known_mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None
