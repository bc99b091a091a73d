"""The order that the scores of a diagnosis suggest, and how sure it is, on made-up scores."""

from __future__ import annotations

import math

import pytest
import torch

from datafree.diagnosis.diagnose import ParentScores, SourceDiagnosis
from datafree.diagnosis.observe import NormDistance, Observation
from datafree.diagnosis.ranking import Place, Scores, light, ranking
from pleas.coverage import Cover


def seen(spread: float, distance: float | None) -> Observation:
    norms = () if distance is None else (NormDistance("bn", 0.1, distance),)
    limit = math.log(10)
    return Observation("a", norms, spread * limit, limit, torch.zeros(4, dtype=torch.int64))


def source(
    name: str, spread: float, distance: float | None, noise: float = 0.0, coverage: float | None = None
) -> SourceDiagnosis:
    """A source whose halves lie `noise` apart in both scores."""

    def moved(by: float) -> Observation:
        return seen(spread + by, None if distance is None else distance + by)

    scores = ParentScores(seen(spread, distance), (moved(-noise / 2), moved(noise / 2)), ())
    cover = None if coverage is None else (Cover("layer", 0.9, (1.0, coverage, 10 * coverage), 0.1),)
    return SourceDiagnosis(name, 64, 1.0, (scores, scores), 0.9, 0.5, cover, None)


def order(found: list[SourceDiagnosis]) -> list[Place]:
    return ranking([Scores.of(one) for one in found])


def test_every_score_agrees() -> None:
    places = order([source("noise", 0.3, 0.7), source("thumbnails", 0.9, 0.2), source("clouds", 0.6, 0.4)])
    assert [place.name for place in places] == ["thumbnails", "clouds", "noise"]
    assert [place.ahead for place in places] == ["sure", "sure", None]
    assert [place.rank for place in places] == [1, 2, 3]


def test_a_difference_within_the_noise_is_open() -> None:
    first, _ = order([source("one", 0.90, 0.20, noise=0.05), source("two", 0.88, 0.21, noise=0.05)])
    assert (first.name, first.ahead) == ("one", "open")
    assert first.why == "one and two differ by less than halves of one source do"


def test_one_score_that_cannot_tell_leaves_it_likely() -> None:
    first, _ = order([source("one", 0.90, 0.20), source("two", 0.898, 0.50)])
    assert first.ahead == "likely"
    assert first.why == "the spread of predictions cannot tell it from two"


def test_a_small_margin_is_only_likely() -> None:
    first, _ = order([source("one", 0.90, 0.20, noise=0.05), source("two", 0.82, 0.28, noise=0.05)])
    assert (first.name, first.ahead) == ("one", "likely")


def test_scores_that_contradict_each_other_are_open() -> None:
    first, _ = order([source("one", 0.9, 0.5), source("two", 0.6, 0.2)])
    assert first.ahead == "open"
    assert first.why == "the batch-norm distance would put two first"


def test_real_images_have_a_vote() -> None:
    first, _ = order([source("one", 0.9, 0.5, coverage=2.0), source("two", 0.6, 0.2, coverage=20.0)])
    assert first.name == "one"


def test_without_batch_norm_the_predictions_decide() -> None:
    first, _ = order([source("one", 0.5, None), source("two", 0.9, None)])
    assert (first.name, first.ahead) == ("two", "sure")


@pytest.mark.parametrize(
    ("spread", "distance", "expected"),
    [
        (0.99, 0.07, "good"),
        (0.80, 0.07, "fair"),
        (0.80, 0.37, "fair"),
        (0.30, 0.65, "poor"),
        (0.95, None, "good"),
        (0.80, None, "fair"),
        (0.50, None, "poor"),
    ],
)
def test_the_light_of_one_source(spread: float, distance: float | None, expected: str) -> None:
    assert light(distance, spread) == expected
