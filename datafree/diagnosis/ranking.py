"""Which source of proxies should merge best, and how sure that is, from the scores of `diagnose`.

Each score ranks the sources; the order is that of the mean rank. How sure the order of two neighbours is depends on
whether the scores agree about it and whether they differ by more than two halves of the same source do.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from datafree.diagnosis.diagnose import SourceDiagnosis

Certainty = Literal["sure", "likely", "open"]
Light = Literal["good", "fair", "poor"]

_CLEAR = 2.0  # times the difference between two halves of one source
_NAMES = {
    "spread": "the spread of predictions",
    "bn_log_var": "the batch-norm distance",
    "log_coverage": "the coverage of real images",
}
_LOWER_IS_BETTER = {"spread": False, "bn_log_var": True, "log_coverage": True}
_SMALLEST = {"spread": 0.01, "bn_log_var": 0.01, "log_coverage": 0.05}  # differences below say nothing


@dataclass(frozen=True)
class Scores:
    """What a source is ranked by.

    values: score -> value, None where it is not known
    noise:  score -> how far two halves of the source differ in it; 0 for coverage, which halves are not asked for
    """

    name: str
    values: Mapping[str, float | None]
    noise: Mapping[str, float]

    @staticmethod
    def of(one: SourceDiagnosis) -> Scores:
        noise = {}
        for key, first in one.half(0).items():
            second = one.half(1)[key]
            noise[key] = 0.0 if first is None or second is None else abs(first - second)
        values = {"spread": one.spread, "bn_log_var": one.bn_log_var, "log_coverage": one.log_coverage}
        return Scores(one.name, values, {**dict.fromkeys(values, 0.0), **noise})

    def known(self, key: str) -> float:
        value = self.values[key]
        assert value is not None
        return value


@dataclass(frozen=True)
class Place:
    """One source's place in the order.

    rank:   mean over the scores of the rank each gives it, 1 is best
    ahead:  how sure it is that the source merges better than the next one; None for the last
    why:    one sentence about `ahead`
    """

    name: str
    rank: float
    ahead: Certainty | None
    why: str


def ranking(found: Sequence[Scores]) -> list[Place]:
    """The sources, the most promising first."""
    keys = _common(found)
    ranks = {one.name: 0.0 for one in found}
    for key in keys:
        for one in found:
            ranks[one.name] += _rank(one, found, key) / len(keys)
    order = sorted(found, key=lambda one: (ranks[one.name], one.name))
    places = [
        Place(one.name, ranks[one.name], *compare(one, after)) for one, after in itertools.pairwise(order)
    ]
    return [*places, Place(order[-1].name, ranks[order[-1].name], None, "")]


def compare(one: Scores, other: Scores) -> tuple[Certainty, str]:
    """How sure it is that `one`, the better by rank, merges better than `other`, and why."""
    gaps = {}
    for key in _common([one, other]):
        sign = -1 if _LOWER_IS_BETTER[key] else 1
        gap = sign * (one.known(key) - other.known(key))
        gaps[key] = gap / max(one.noise[key], other.noise[key], _SMALLEST[key])
    against = [_NAMES[key] for key, gap in gaps.items() if gap <= -1]
    if against:
        return "open", f"{' and '.join(against)} would put {other.name} first"
    close = [_NAMES[key] for key, gap in gaps.items() if gap < 1]
    if len(close) == len(gaps):
        return "open", f"{one.name} and {other.name} differ by less than halves of one source do"
    if close:
        return "likely", f"{' and '.join(close)} cannot tell it from {other.name}"
    if min(gaps.values()) < _CLEAR:
        return "likely", "every score agrees, not all of them by a clear margin"
    return "sure", "every score agrees by more than twice what halves of one source differ by"


def light(bn_log_var: float | None, spread: float) -> Light:
    """What the scores of one source alone say, by the values that sources had on CIFAR ResNet-20s."""
    if bn_log_var is None:
        return "good" if spread >= 0.9 else "fair" if spread >= 0.7 else "poor"
    if bn_log_var < 0.25 and spread >= 0.9:
        return "good"
    return "fair" if bn_log_var < 0.45 and spread >= 0.7 else "poor"


def _common(found: Sequence[Scores]) -> list[str]:
    """The scores that are known of every source."""
    return [key for key in _NAMES if all(one.values.get(key) is not None for one in found)]


def _rank(one: Scores, found: Sequence[Scores], key: str) -> float:
    """1 for the best; equal values share the mean of their ranks."""
    sign = 1 if _LOWER_IS_BETTER[key] else -1
    own = sign * one.known(key)
    better = sum(sign * other.known(key) < own for other in found)
    equal = sum(sign * other.known(key) == own for other in found)
    return better + (equal + 1) / 2
