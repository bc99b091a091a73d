"""Which source of proxies should merge best, and how sure that is, from the scores of `diagnose`.

Each score ranks the sources; the order is that of the mean rank. How sure the order of two neighbours is depends on
whether the scores agree about it and whether they differ by more than two halves of the same source do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from datafree.diagnose import SourceDiagnosis

Certainty = Literal["sure", "likely", "open"]
Light = Literal["good", "fair", "poor"]

_CLEAR = 2.0  # times the difference between two halves of one source
_SMALLEST = {"spread": 0.01, "bn_log_var": 0.01, "log_coverage": 0.05}  # differences below say nothing
_LOWER_IS_BETTER = {"spread": False, "bn_log_var": True, "log_coverage": True}


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


def ranking(found: Sequence[SourceDiagnosis]) -> list[Place]:
    """The sources, the most promising first."""
    scores = {one.name: _scores(one) for one in found}
    common = [key for key in _LOWER_IS_BETTER if all(values[key] is not None for values in scores.values())]
    ranks = {one.name: 0.0 for one in found}
    for key in common:
        for name, rank in _ranks({name: _known(values, key) for name, values in scores.items()}, key).items():
            ranks[name] += rank / len(common)
    order = sorted(found, key=lambda one: (ranks[one.name], one.name))
    places = []
    for position, one in enumerate(order):
        if position + 1 == len(order):
            places.append(Place(one.name, ranks[one.name], None, ""))
        else:
            places.append(Place(one.name, ranks[one.name], *_ahead(one, order[position + 1], scores, common)))
    return places


def light(one: SourceDiagnosis) -> Light:
    """What the scores of one source alone say, by the values that sources had on CIFAR ResNet-20s."""
    distance = one.bn_log_var
    if distance is None:
        return "good" if one.spread >= 0.9 else "fair" if one.spread >= 0.7 else "poor"
    if distance < 0.25 and one.spread >= 0.9:
        return "good"
    return "fair" if distance < 0.45 and one.spread >= 0.7 else "poor"


def _scores(one: SourceDiagnosis) -> dict[str, float | None]:
    return {"spread": one.spread, "bn_log_var": one.bn_log_var, "log_coverage": one.log_coverage}


def _known(values: dict[str, float | None], key: str) -> float:
    value = values[key]
    assert value is not None
    return value


def _ranks(values: dict[str, float], key: str) -> dict[str, float]:
    """1 for the best; equal values share the mean of their ranks."""
    sign = 1 if _LOWER_IS_BETTER[key] else -1
    found = {}
    for name, value in values.items():
        better = sum(sign * other < sign * value for other in values.values())
        equal = sum(other == value for other in values.values())
        found[name] = better + (equal + 1) / 2
    return found


def _ahead(
    one: SourceDiagnosis,
    other: SourceDiagnosis,
    scores: dict[str, dict[str, float | None]],
    common: Sequence[str],
) -> tuple[Certainty, str]:
    gaps = {}
    for key in common:
        sign = -1 if _LOWER_IS_BETTER[key] else 1
        gap = sign * (_known(scores[one.name], key) - _known(scores[other.name], key))
        gaps[key] = gap / max(_noise(one, key), _noise(other, key), _SMALLEST[key])
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


_NAMES = {
    "spread": "the spread of predictions",
    "bn_log_var": "the batch-norm distance",
    "log_coverage": "the coverage of real images",
}


def _noise(one: SourceDiagnosis, key: str) -> float:
    """How far two halves of a source differ in a score; halves are not asked for their coverage."""
    if key == "log_coverage":
        return 0.0
    first, second = one.half(0)[key], one.half(1)[key]
    return 0.0 if first is None or second is None else abs(first - second)
