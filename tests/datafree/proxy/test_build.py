from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
import pytest
import torch

from datafree.errors import UsageError
from datafree.images.image_set import content_hash
from datafree.models.parent import Parent
from datafree.proxy import (
    SHARD,
    SOURCES,
    NoiseSpec,
    ProxySet,
    ProxySpec,
    Request,
    Source,
    SourceSpec,
    register,
)

Build = Callable[..., ProxySet]
MakeParent = Callable[..., Parent]

NOISE = {"kind": "noise"}
PAINTED = {"kind": "procedural"}


def all_images(proxies: ProxySet) -> torch.Tensor:
    return torch.cat(list(proxies.batches(50)))


def test_images_do_not_depend_on_batch_size_or_count(build: Build) -> None:
    proxies = build(150, NOISE)
    whole = all_images(proxies)
    assert whole.shape == (150, 3, 16, 16)
    assert whole.dtype == torch.uint8
    assert [len(batch) for batch in proxies.batches(64)] == [64, 64, 22]
    assert torch.equal(torch.cat(list(proxies.batches(7))), whole)
    assert torch.equal(all_images(build(90, NOISE)), whole[:90])
    assert torch.equal(proxies.batch([149, 0, 70]), whole[[149, 0, 70]])


def test_the_same_recipe_gives_the_same_bytes(build: Build, tmp_path: Path) -> None:
    one = build(100, NOISE, cache=tmp_path / "one")
    two = build(100, NOISE, cache=tmp_path / "two")
    assert one.fingerprint == two.fingerprint
    assert [a.path.read_bytes() for a in one.shards[0]] == [b.path.read_bytes() for b in two.shards[0]]
    assert build(100, NOISE, seed=1).fingerprint != one.fingerprint


def test_the_second_time_nothing_is_made(build: Build) -> None:
    first, second = build(100, NOISE), build(100, NOISE)
    assert (first.manifest[0].made, second.manifest[0].made) == (2, 0)
    assert second.fingerprint == first.fingerprint
    assert second.manifest[0].seconds == first.manifest[0].seconds


def test_no_global_randomness_is_used_or_moved(build: Build, tmp_path: Path) -> None:
    inversion = {"kind": "inversion", "steps": 2}
    shares = ((NOISE, 0.5), (PAINTED, 0.25), (inversion, 0.25))
    sources = [source | {"share": share} for source, share in shares]
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global state is what is looked at
    before, numpy_before = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    one = build(16, *sources, cache=tmp_path / "one")
    assert torch.equal(torch.get_rng_state(), before)
    assert str(np.random.get_state()) == numpy_before  # noqa: NPY002
    torch.manual_seed(2)
    assert build(16, *sources, cache=tmp_path / "two").fingerprint == one.fingerprint


def test_a_mixture_deals_the_images_of_each_source_in_order(build: Build) -> None:
    mixed = build(100, NOISE | {"share": 0.7}, PAINTED | {"share": 0.3})
    assert [report.count for report in mixed.manifest] == [70, 30]
    for number, alone in enumerate((build(70, NOISE), build(30, PAINTED))):
        images = all_images(mixed)[torch.from_numpy(mixed.order[:, 0] == number)]
        assert torch.equal(images, all_images(alone))
        assert torch.equal(all_images(mixed.source(number)), images)
    assert torch.equal(all_images(mixed.prefix(40)), all_images(mixed)[:40])
    assert mixed.prefix(40).fingerprint != mixed.fingerprint


def test_progress_counts_shards_of_all_sources(build: Build) -> None:
    heard: list[tuple[str, int, int]] = []
    build(
        160,
        NOISE | {"share": 0.8},
        PAINTED | {"share": 0.2},
        progress=lambda *step: heard.append(step),
    )
    assert heard == [("proxy", 1, 3), ("proxy", 2, 3), ("proxy", 3, 3)]


def test_the_manifest_says_what_was_made(build: Build) -> None:
    proxies = build(100, NOISE)
    (report,) = proxies.manifest
    manifest = json.loads((Path(report.folder) / "manifest.json").read_text())
    assert manifest["key"]["section"] == {
        "kind": "noise",
        "form": "gaussian",
        "scale": 0.25,
        "augment": "none",
    }
    assert manifest["key"]["size"] == [16, 16]
    assert [shard["images"] for shard in manifest["shards"].values()] == [64, 64]
    assert (report.kind, report.count, report.shards) == ("noise", 100, 2)
    assert report.spec["share"] == 1.0
    assert proxies.notes == (
        "noise excites few directions of a network's features, so least squares from it is poor: a baseline, "
        "not a source to merge from",
    )


def test_hashes_name_every_image(build: Build) -> None:
    proxies = build(70, NOISE)
    assert proxies.hashes() == [content_hash(image.numpy()) for image in all_images(proxies)]


def test_the_share_is_not_part_of_what_an_image_is(build: Build) -> None:
    build(64, NOISE)
    assert build(128, NOISE | {"share": 0.5}, PAINTED | {"share": 0.5}).manifest[0].made == 0


@pytest.mark.parametrize(
    ("name", "other", "text"),
    [
        ("size", {"size": 8}, "a takes 16x16 RGB, b takes 8x8 RGB"),
        ("colour", {"channels": 1}, "a takes 16x16 RGB, b takes 16x16 grey"),
    ],
)
def test_parents_that_take_different_images(
    build: Build, parent: MakeParent, name: str, other: dict[str, int], text: str
) -> None:
    with pytest.raises(UsageError) as error:
        build(64, NOISE, parents=(parent("a"), parent("b", **other)))
    assert str(error.value) == (
        f"the parents take different images ({text}), but proxies are made once and shown to both in the "
        "same pixels: give both the same preprocess.size and the same number of channels"
    )


def test_grey_parents_get_grey_images(build: Build, parent: MakeParent) -> None:
    grey = (parent("a", 1, channels=1), parent("b", 2, channels=1))
    for source in (NOISE, PAINTED, {"kind": "inversion", "steps": 2}):
        assert all_images(build(8, source, parents=grey)).shape == (8, 1, 16, 16)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (
            {"count": 8, "sources": [NOISE, PAINTED]},
            "the shares under proxy.sources (1, 1) add up to 2: make them add up to 1",
        ),
        (
            {"count": 8, "sources": [NOISE | {"share": 0.5}] * 2},
            'proxy.sources lists {"augment":"none","kind":"noise","form":"gaussian","scale":0.25} twice, which '
            "would give the same images twice: add its shares",
        ),
        ({"count": 8, "sources": [{"kind": "nose"}]}, "does not match any of the expected tags"),
        ({"count": 0, "sources": [NOISE]}, "greater than or equal to 1"),
        ({"count": 8, "sources": []}, "at least 1 item"),
        ({"count": 8, "sources": [NOISE | {"from": "uniform"}]}, "Extra inputs are not permitted"),
    ],
)
def test_sections_that_make_no_sense(spec: dict[str, object], text: str) -> None:
    with pytest.raises(pydantic.ValidationError) as error:
        ProxySpec.model_validate(spec)
    assert text in str(error.value)


def test_a_kind_is_registered_once() -> None:
    assert SOURCES["noise"] is NoiseSpec

    class AnotherNoise(SourceSpec):
        kind: Literal["noise"] = "noise"

        def bind(self, request: Request) -> Source:
            raise AssertionError

    with pytest.raises(ValueError, match="proxy source 'noise' is registered twice"):
        register(AnotherNoise)


def test_shards_hold_64_images_whoever_asks(build: Build) -> None:
    assert SHARD == 64  # part of every cache key: changing it changes every image
    assert build(3, NOISE).shards[0][0].images == 64
