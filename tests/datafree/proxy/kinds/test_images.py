from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datafree.errors import UsageError
from datafree.images.image_set import ImageSpec, load_images
from datafree.models.parent import Parent
from datafree.proxy import ProxySet
from datafree.proxy.kinds.images import frame, stratified_order

Build = Callable[..., ProxySet]
MakeParent = Callable[..., Parent]


def write_folder(folder: Path, per_class: int, size: tuple[int, int] = (24, 20)) -> None:
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03}.jpg")


def source(folder: str, **options: object) -> dict[str, object]:
    return {"kind": "images", "images": {"folder": folder, **options}}


def test_a_folder_is_framed_to_the_parents_size(build: Build, tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", 40)
    proxies = build(70, source("photos"))
    assert proxies.batch(range(70)).shape == (70, 3, 16, 16)
    assert len(set(proxies.hashes()[:70])) == 70


def test_arrays_are_kept_as_they_are_when_the_size_fits(build: Build, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (80, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", x_test=images)
    proxies = build(80, {"kind": "images", "images": {"npz": "set.npz"}})
    given_hashes = load_images(ImageSpec(npz="set.npz"), tmp_path).hashes()
    assert sorted(proxies.hashes()[:80]) == sorted(given_hashes)
    assert proxies.batch(range(3)).dtype == torch.uint8


def test_resized_images_are_still_recognised_by_the_hash_of_the_original(
    build: Build, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (70, 20, 20, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", x_test=images)
    proxies = build(70, {"kind": "images", "images": {"npz": "set.npz"}})
    given_hashes = load_images(ImageSpec(npz="set.npz"), tmp_path).hashes()
    assert set(given_hashes) <= set(proxies.hashes())
    assert set(build(5, {"kind": "images", "images": {"npz": "set.npz"}}).hashes()) <= set(proxies.hashes())


def test_every_prefix_holds_the_classes_evenly(build: Build, tmp_path: Path) -> None:
    images = np.zeros((90, 16, 16, 3), dtype=np.uint8)
    labels = np.array([0] * 60 + [1] * 20 + [2] * 10)
    images += labels.astype(np.uint8)[:, None, None, None]
    np.savez(tmp_path / "set.npz", x_test=images, y_test=labels)
    seen = build(90, {"kind": "images", "images": {"npz": "set.npz"}}).batch(range(90))[:, 0, 0, 0]
    assert torch.bincount(seen[:30]).tolist() == [10, 10, 10]
    assert torch.bincount(seen[:50]).tolist() == [20, 20, 10]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 5))
def test_the_stratified_order_is_a_permutation_dealt_in_turn(labels: list[int], seed: int) -> None:
    array = np.array(labels)
    order = stratified_order(array, len(array), torch.Generator().manual_seed(seed))
    assert sorted(order.tolist()) == list(range(len(array)))
    sizes = np.bincount(array)
    for n in range(len(array) + 1):
        counts = np.bincount(array[order[:n]], minlength=len(sizes))
        unfinished = counts[(counts < sizes) & (sizes > 0)]
        if len(unfinished):  # nobody is more than one ahead of a class that still has images
            assert counts.max() <= unfinished.min() + 1


def test_another_seed_chooses_other_images(build: Build, tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", 40)
    one, two = build(10, source("photos")), build(10, source("photos"), seed=1)
    assert set(one.hashes()) != set(two.hashes())


def test_files_that_cannot_be_decoded_are_named_and_passed_over(build: Build, tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", 40)
    whole = (tmp_path / "photos" / "cat" / "007.jpg").read_bytes()
    (tmp_path / "photos" / "cat" / "007.jpg").write_bytes(whole[:-60])
    proxies = build(79, source("photos"))
    assert len(set(proxies.hashes()[:79])) == 79
    (note,) = [note for note in proxies.notes if "skipped" in note]
    assert note.startswith("skipped, cannot be read: 007.jpg (")
    assert build(79, source("photos")).notes == proxies.notes  # also when everything comes from the cache


def test_too_many_broken_files(build: Build, tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", 40)
    for path in (tmp_path / "photos" / "cat").iterdir():
        whole = path.read_bytes()
        path.write_bytes(whole[:-60])
    with pytest.raises(
        UsageError, match=r"^\d+ of the \d+ images tried in photos cannot be read \(.*fetch them"
    ):
        build(64, source("photos"))


def test_more_images_than_there_are(build: Build, tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", 5)
    with pytest.raises(UsageError) as error:
        build(64, source("photos") | {"share": 0.5}, {"kind": "noise", "share": 0.5})
    assert str(error.value) == (
        "proxy source 1 (images) has 10 images, but 32 are asked of it (count 64 x share 0.5): lower "
        "proxy.count or its share, or add images"
    )


def test_a_missing_folder(build: Build, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        build(64, source("nowhere"))
    assert str(error.value) == f"image folder {tmp_path / 'nowhere'} does not exist"


def test_new_files_are_new_images(build: Build, tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", 40)
    build(10, source("photos"))
    Image.new("RGB", (20, 20)).save(tmp_path / "photos" / "cat" / "new.png")
    assert build(10, source("photos")).manifest[0].made == 1


def test_colour_images_for_grey_parents_are_said(build: Build, parent: MakeParent, tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", 5)
    grey = (parent("a", channels=1), parent("b", channels=1))
    proxies = build(10, source("photos"), parents=grey)
    assert proxies.batch([0]).shape == (1, 1, 16, 16)
    assert proxies.notes == ("colour images become grey by the luma weights 0.299 R + 0.587 G + 0.114 B",)


def test_framing_covers_and_cuts_the_centre() -> None:
    image = torch.zeros(1, 1, 8, 16, dtype=torch.uint8)
    image[..., 4:12] = 200
    assert torch.equal(frame(image, (8, 8)), torch.full((1, 1, 8, 8), 200, dtype=torch.uint8))
    assert frame(image, (5, 7)).shape == (1, 1, 5, 7)
    assert torch.equal(frame(image, (8, 16)), image)
