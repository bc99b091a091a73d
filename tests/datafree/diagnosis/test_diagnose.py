"""Scores of sources from one look through the parents, and how many images are enough."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pleas
from datafree.diagnosis.diagnose import diagnose
from datafree.errors import UsageError
from datafree.models.parent import Parent
from datafree.proxy import ProxySet, ProxySpec, build_proxies
from datafree.proxy.settle import images_until_settled
from tests.datafree.conftest import make_parent

Make = Callable[[ProxySpec], ProxySet]


@pytest.fixture(scope="module")
def three() -> tuple[Parent, ...]:
    return make_parent("a", 1), make_parent("b", 2), make_parent("c", 3)


def traced(parents: Sequence[Parent], settings: pleas.MergeSettings | None = None) -> pleas.Parents:
    modules, names = [parent.module for parent in parents], [parent.name for parent in parents]
    return pleas.Parents.of(
        modules, torch.zeros(2, 3, 16, 16), settings or pleas.MergeSettings(), names=names
    )


@pytest.fixture(scope="module")
def networks(three: tuple[Parent, ...]) -> pleas.Parents:
    return traced(three)


@pytest.fixture
def make(three: tuple[Parent, ...], tmp_path: Path) -> Make:
    return lambda spec: build_proxies(spec, three, 0, tmp_path, tmp_path)


def spec_of(count: int, *kinds: str) -> ProxySpec:
    share = 1 / len(kinds)
    return ProxySpec.model_validate({"count": count, "sources": [{"kind": k, "share": share} for k in kinds]})


def test_every_source_and_all_together(
    three: tuple[Parent, ...], networks: pleas.Parents, make: Make
) -> None:
    heard: list[tuple[str, int, int]] = []
    found = diagnose(
        make(spec_of(128, "inversion", "noise")),
        three,
        networks,
        progress=lambda *step: heard.append(step),
    )
    assert [(one.name, one.images) for one in found] == [("1 inversion", 64), ("2 noise", 64), ("all", 128)]
    assert heard[-1] == ("diagnosis", 3, 3)
    inversion, noise, _ = found
    assert inversion.bn_log_var is not None
    assert noise.bn_log_var is not None
    assert inversion.bn_log_var < noise.bn_log_var
    for one in found:
        assert 0 <= one.stability <= 1
        assert one.agreement is not None
        assert 0 <= one.agreement <= 1
        assert one.cover is None
        assert 0 < one.spread <= 1
        written = json.loads(json.dumps(one.to_dict()))
        assert list(written["parents"]) == ["a", "b", "c"]
        assert [layer["layer"] for layer in written["parents"]["a"]["norms"]] == ["1", "4"]


def test_real_images_add_the_comparisons(
    three: tuple[Parent, ...], networks: pleas.Parents, make: Make
) -> None:
    proxies = make(spec_of(128, "procedural"))
    (same,) = diagnose(proxies, three, networks, real=proxies.batch(range(128)))
    assert same.matched_as_real == 1.0
    assert same.cover is not None
    assert all(layer.cosine == pytest.approx(1) for layer in same.cover)
    assert all(layer.excess == pytest.approx(0, abs=1e-6) for layer in same.cover)


def test_a_source_of_one_image_is_refused(
    three: tuple[Parent, ...], networks: pleas.Parents, make: Make
) -> None:
    with pytest.raises(UsageError) as caught:
        diagnose(make(spec_of(2, "noise", "procedural")), three, networks)
    assert str(caught.value) == (
        "source 1 noise has 1 image, but a diagnosis compares two halves: raise proxy.count"
    )


def test_two_parents_are_told_apart_as_three_are(three: tuple[Parent, ...], make: Make) -> None:
    """What is said of one parent does not depend on who else is merged."""
    proxies = make(spec_of(64, "noise"))
    (both,), (all_three,) = (diagnose(proxies, some, traced(some)) for some in (three[:2], three))
    assert [one.observation.parent for one in both.parents] == ["a", "b"]
    for few, many in zip(both.parents, all_three.parents, strict=False):
        assert few.spread == pytest.approx(many.spread)
        assert few.effective_rank == pytest.approx(many.effective_rank, rel=1e-4)
    assert both.agreement is not None
    assert all_three.agreement is not None
    assert all_three.agreement <= both.agreement


def test_a_parent_that_normalises_differently_sees_the_same_pixels(
    three: tuple[Parent, ...], make: Make
) -> None:
    other = replace(three[1], preprocess=replace(three[1].preprocess, mean=(0.4,) * 3))
    same, moved = (
        diagnose(make(spec_of(64, "noise")), some, traced(some))[0] for some in (three[:2], (three[0], other))
    )
    assert moved.parents[0].spread == same.parents[0].spread
    assert moved.parents[1].spread != same.parents[1].spread


def test_separate_labels_have_no_agreement(three: tuple[Parent, ...], make: Make) -> None:
    networks = traced(three, pleas.MergeSettings(heads="separate"))
    (one,) = diagnose(make(spec_of(64, "noise")), three, networks)
    assert one.agreement is None


def collector(
    parents: Sequence[Parent], networks: pleas.Parents
) -> Callable[[Sequence[torch.Tensor], int, int], pleas.Statistics]:
    def collect(batches: Sequence[torch.Tensor], first: int, total: int) -> pleas.Statistics:
        inputs = [parents[0].preprocess(images) for images in batches]
        return pleas.collect(networks, inputs, first_image=first, images=total)

    return collect


def test_images_are_made_until_the_moments_settle(
    three: tuple[Parent, ...], networks: pleas.Parents, make: Make
) -> None:
    asked: list[int] = []

    def counting(spec: ProxySpec) -> ProxySet:
        asked.append(spec.count)
        return make(spec)

    found = images_until_settled(spec_of(4096, "noise"), counting, collector(three, networks), 32, 0.2)
    assert found.settled
    assert asked == [32 * 2**k for k in range(len(asked))]
    assert found.images == asked[-1] < 4096
    assert found.worst(found.images)[1] <= 0.2
    earlier = [found.worst(count)[1] for count in found.changes if count < found.images]
    assert all(change > 0.2 for change in earlier)


def test_a_cap_ends_the_search(three: tuple[Parent, ...], networks: pleas.Parents, make: Make) -> None:
    found = images_until_settled(spec_of(100, "noise"), make, collector(three, networks), 32, 1e-6)
    assert (found.images, found.settled) == (100, False)
    assert list(found.changes) == [64, 100]
