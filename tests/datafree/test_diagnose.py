from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import pleas
from datafree.diagnose import diagnose
from datafree.errors import UsageError
from datafree.models import Parent
from datafree.proxy import ProxySet, ProxySpec, build_proxies
from datafree.proxy.settle import images_until_settled
from tests.datafree.proxy.conftest import make_parent

SETTINGS = pleas.MergeSettings()


@pytest.fixture(scope="module")
def pair() -> tuple[Parent, Parent]:
    return make_parent("a", 1), make_parent("b", 2)


@pytest.fixture(scope="module")
def symmetry(pair: tuple[Parent, Parent]) -> pleas.Symmetry:
    return pleas.trace(pair[0].module, torch.zeros(2, 3, 16, 16))


@pytest.fixture
def make(pair: tuple[Parent, Parent], tmp_path: Path) -> Callable[[ProxySpec], ProxySet]:
    return lambda spec: build_proxies(spec, pair, 0, tmp_path, tmp_path)


def spec_of(count: int, *kinds: str) -> ProxySpec:
    share = 1 / len(kinds)
    return ProxySpec.model_validate({"count": count, "sources": [{"kind": k, "share": share} for k in kinds]})


def test_every_source_and_all_together(
    pair: tuple[Parent, Parent], symmetry: pleas.Symmetry, make: Callable[[ProxySpec], ProxySet]
) -> None:
    heard: list[tuple[str, int, int]] = []
    found = diagnose(
        make(spec_of(128, "inversion", "noise")),
        pair,
        symmetry,
        SETTINGS,
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
        assert set(written["parents"]) == {"a", "b"}
        assert [layer["layer"] for layer in written["parents"]["a"]["norms"]] == ["1", "4"]


def test_real_images_add_the_comparisons(
    pair: tuple[Parent, Parent], symmetry: pleas.Symmetry, make: Callable[[ProxySpec], ProxySet]
) -> None:
    proxies = make(spec_of(128, "procedural"))
    (same,) = diagnose(proxies, pair, symmetry, SETTINGS, real=proxies.batch(range(128)))
    assert same.matched_as_real == 1.0
    assert same.cover is not None
    assert all(layer.cosine == pytest.approx(1) for layer in same.cover)
    assert all(layer.excess == pytest.approx(0, abs=1e-6) for layer in same.cover)


def test_a_source_of_one_image_is_refused(
    pair: tuple[Parent, Parent], symmetry: pleas.Symmetry, make: Callable[[ProxySpec], ProxySet]
) -> None:
    with pytest.raises(UsageError) as caught:
        diagnose(make(spec_of(2, "noise", "procedural")), pair, symmetry, SETTINGS)
    assert str(caught.value) == (
        "source 1 noise has 1 image, but a diagnosis compares two halves: raise proxy.count"
    )


def test_separate_labels_have_no_agreement(
    pair: tuple[Parent, Parent], symmetry: pleas.Symmetry, make: Callable[[ProxySpec], ProxySet]
) -> None:
    settings = pleas.MergeSettings(heads="separate")
    (one,) = diagnose(make(spec_of(64, "noise")), pair, symmetry, settings)
    assert one.agreement is None


def collector(
    pair: tuple[Parent, Parent], symmetry: pleas.Symmetry
) -> Callable[[Sequence[torch.Tensor], int, int], pleas.Statistics]:
    a, b = pair

    def collect(batches: Sequence[torch.Tensor], first: int, total: int) -> pleas.Statistics:
        inputs = [a.preprocess(images) for images in batches]
        return pleas.collect(symmetry, a.module, b.module, inputs, SETTINGS, first_image=first, images=total)

    return collect


def test_images_are_made_until_the_moments_settle(
    pair: tuple[Parent, Parent], symmetry: pleas.Symmetry, make: Callable[[ProxySpec], ProxySet]
) -> None:
    asked: list[int] = []

    def counting(spec: ProxySpec) -> ProxySet:
        asked.append(spec.count)
        return make(spec)

    found = images_until_settled(spec_of(4096, "noise"), counting, collector(pair, symmetry), 32, 0.2)
    assert found.settled
    assert asked == [32 * 2**k for k in range(len(asked))]
    assert found.images == asked[-1] < 4096
    assert found.worst(found.images)[1] <= 0.2
    earlier = [found.worst(count)[1] for count in found.changes if count < found.images]
    assert all(change > 0.2 for change in earlier)


def test_a_cap_ends_the_search(
    pair: tuple[Parent, Parent], symmetry: pleas.Symmetry, make: Callable[[ProxySpec], ProxySet]
) -> None:
    found = images_until_settled(spec_of(100, "noise"), make, collector(pair, symmetry), 32, 1e-6)
    assert (found.images, found.settled) == (100, False)
    assert list(found.changes) == [64, 100]
