"""Images: every source gives the pixels one would read by hand; every wrong source says what is wrong."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
from PIL import Image
from torchvision import datasets

from datafree.errors import UsageError
from datafree.images.files import BROKEN_SHARE
from datafree.images.image_set import ImageSet, ImageSpec, content_hash, load_images


def load(base: Path, *, verify: bool = True, **keys: Any) -> ImageSet:
    return load_images(ImageSpec.model_validate(keys), base, verify=verify)


def refusal(base: Path, **keys: Any) -> str:
    with pytest.raises(UsageError) as caught:
        load(base, **keys)
    return str(caught.value)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(path: Path, pixels: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


# Folders ----------------------------------------------------------------------------------------------------


def test_a_flat_folder_is_unlabelled_and_sorted(tmp_path: Path) -> None:
    pixels = noise(3, 6, 5, 3)
    for index, name in enumerate(("c.png", "a.png", "b.png")):
        picture(tmp_path / name, pixels[index])
    (tmp_path / "notes.txt").write_text("not an image")
    images = load(tmp_path, folder=".")
    assert images.labels is None
    assert images.shape == (3, 6, 5)
    expected = torch.from_numpy(pixels[[1, 2, 0]]).permute(0, 3, 1, 2)
    assert torch.equal(images.batch(range(3)), expected)


def test_subfolders_are_classes(tmp_path: Path) -> None:
    for index, name in enumerate(("dog/1.png", "cat/1.png", "cat/deep/2.png")):
        picture(tmp_path / name, noise(4, 4, 3, seed=index))
    images = load(tmp_path, folder=str(tmp_path))
    assert images.classes == ("cat", "dog")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1]
    assert load(tmp_path, folder=".", keep_labels=(1,)).hashes() == images.hashes()[2:]


def test_grey_files_stay_grey_and_mixed_ones_become_rgb(tmp_path: Path) -> None:
    picture(tmp_path / "grey" / "1.png", noise(4, 4))
    assert load(tmp_path, folder="grey").shape == (1, 4, 4)
    picture(tmp_path / "mixed" / "1.png", noise(4, 4))
    picture(tmp_path / "mixed" / "2.png", noise(4, 4, 3))
    mixed = load(tmp_path, folder="mixed")
    assert mixed.shape == (3, 4, 4)
    assert (mixed.images[0] == noise(4, 4)).all()


def test_alpha_is_dropped(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", noise(4, 4, 4))
    assert (load(tmp_path, folder=".").images[0] == noise(4, 4, 4)[..., :3].transpose(2, 0, 1)).all()


def test_exif_orientation_is_applied_to_pixels_and_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    pixels = noise(4, 6, 3)
    picture(tmp_path / "1.png", pixels, exif=exif)
    images = load(tmp_path, folder=".")
    assert images.shape == (3, 6, 4)
    assert (images.images[0].transpose(1, 2, 0) == np.rot90(pixels, -1)).all()


def test_unequal_sizes_are_framed_only_when_a_size_is_said(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", noise(8, 12, 3))
    picture(tmp_path / "2.png", noise(16, 8, 3))
    message = refusal(tmp_path, folder=".")
    assert "have 2 sizes (8 x 12, 16 x 8): say which they should get, for example `size: 224`" in message
    images = load(tmp_path, folder=".", size=8)
    assert images.shape == (3, 8, 8)
    assert (images.images[0] == noise(8, 12, 3)[:, 2:10].transpose(2, 0, 1)).all()  # only the centre is cut
    assert load(tmp_path, folder=".", size=(4, 6), crop=0.5).shape == (3, 4, 6)


def test_a_smaller_crop_shows_less_of_the_image(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16), np.uint8)
    pixels[4:12, 4:12] = 200
    picture(tmp_path / "1.png", pixels)
    assert (load(tmp_path, folder=".", size=8, crop=1.0).images[0] == 0).any()
    assert (load(tmp_path, folder=".", size=8, crop=0.5).images[0] == 200).all()


def broken_folder(folder: Path, good: int) -> None:
    for index in range(good):
        picture(folder / f"{index:02}.jpg", noise(64, 64, 3, seed=index))
    (folder / "page.jpg").write_text("<html>")
    whole = folder / "00.jpg"
    (folder / "torn.jpg").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])


def test_broken_files_are_named_skipped_and_counted(tmp_path: Path) -> None:
    broken_folder(tmp_path, 18)
    images = load(tmp_path, folder=".")
    assert len(images) == 18
    assert images.notes[0].startswith(
        f"2 of 20 image files in {tmp_path} cannot be read and were skipped: page.jpg: "
    )
    assert "torn.jpg: " in images.notes[0]
    assert len(load(tmp_path, folder=".", verify=False)) == 19  # headers alone do not show the torn one


def test_too_many_broken_files_are_refused(tmp_path: Path) -> None:
    broken_folder(tmp_path, 17)
    assert BROKEN_SHARE < 2 / 19
    assert f"2 of 19 image files in {tmp_path} cannot be read, more than 10%" in refusal(tmp_path, folder=".")


def test_deep_pixels_count_as_broken(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "1.png")
    assert "only 8 bits per channel are read" in refusal(tmp_path, folder=".")


def test_wrong_folders_say_what_is_wrong(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path, folder="nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no image (.jpg, " in refusal(tmp_path, folder="empty")
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(tmp_path, folder="file")
    picture(tmp_path / "both" / "1.png", noise(4, 4))
    picture(tmp_path / "both" / "sub" / "1.png", noise(4, 4))
    assert "holds 1 images itself and others in 1 subfolders" in refusal(tmp_path, folder="both")
    assert "has no labels, so keep_labels cannot choose" in refusal(
        tmp_path, folder="both/sub", keep_labels=(0,)
    )


# Arrays -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 3), (5, 3, 6, 7), (5, 6, 7, 1), (5, 1, 6, 7)])
def test_arrays_of_every_layout_are_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = noise(*shape)
    np.savez(tmp_path / "set.npz", x_test=x, y_test=np.arange(5), classes=list("abcde"))
    images = load(tmp_path, npz="set.npz")
    assert images.shape == (3 if 3 in shape else 1, 6, 7)
    assert images.labels is not None
    assert (images.labels == np.arange(5)).all()
    assert images.classes == tuple("abcde")
    first = x[0].transpose(2, 0, 1) if shape[-1] in (1, 3) else x[0]
    assert (images.batch([0])[0].numpy() == first.reshape(images.shape)).all()


def test_labels_follow_the_name_of_the_images(tmp_path: Path) -> None:
    x = noise(4, 6, 6)
    np.savez(tmp_path / "set.npz", photo_x_train=x, photo_y_train=[3, 2, 1, 0], x=x, target=[0, 0, 1, 1])
    assert load(tmp_path, npz="set.npz", x="photo_x_train").labels.tolist() == [3, 2, 1, 0]  # pyright: ignore
    assert load(tmp_path, npz="set.npz", x="x").labels is None
    assert load(tmp_path, npz="set.npz", x="x", y="target").labels.tolist() == [0, 0, 1, 1]  # pyright: ignore


def test_wrong_arrays_say_what_is_wrong(tmp_path: Path) -> None:
    x = noise(4, 6, 6)
    np.savez(
        tmp_path / "set.npz", x_test=x, y_test=[0, 1, 2], real=x / 255, odd=noise(4, 6, 6, 2), none=x[:0]
    )
    np.savez(tmp_path / "objects.npz", x_test=np.array([{"a": 1}], dtype=object))
    np.save(tmp_path / "single.npy", x)
    (tmp_path / "torn.npz").write_bytes((tmp_path / "set.npz").read_bytes()[:100])
    for keys, message in (
        ({"npz": "set.npz"}, "labels are int64 of shape (3,); 4 integers from 0 are needed"),
        (
            {"npz": "set.npz", "x": "x_tset"},
            "has no array 'x_tset'; it has x_test, y_test, real, odd, none; did you mean 'x_test'?",
        ),
        ({"npz": "set.npz", "x": "real"}, "images are float64, uint8 from 0 to 255 is needed"),
        (
            {"npz": "set.npz", "x": "odd"},
            "shape (4, 6, 6, 2) is none of (N, H, W), (N, H, W, C) and (N, C, H, W)",
        ),
        ({"npz": "set.npz", "x": "none"}, "there is no image in the array"),
        ({"npz": "objects.npz"}, "holds pickled Python objects, which are not read"),
        ({"npz": "single.npy"}, "holds a single array"),
        ({"npz": "torn.npz"}, "cannot be read as .npz"),
        ({"npz": "missing.npz"}, "missing.npz does not exist"),
    ):
        assert message in refusal(tmp_path, **keys), keys


# Digits and torchvision -------------------------------------------------------------------------------------


def test_digits_are_split_once_and_turned(tmp_path: Path) -> None:
    parts = {
        (domain, split): load(tmp_path, digits={"domain": domain, "split": split})
        for domain in ("upright", "rotated")
        for split in ("train", "test")
    }
    assert [len(part) for part in parts.values()] == [1000, 797, 1000, 797]
    assert parts["upright", "test"].shape == (1, 8, 8)
    train, test = set(parts["upright", "train"].hashes()), set(parts["upright", "test"].hashes())
    assert not train & test  # some drawings are identical: none of those may stand in both splits
    upright, rotated = (parts[domain, "test"].images[5][0] for domain in ("upright", "rotated"))
    assert (np.rot90(255 - upright) == rotated).all()
    assert upright.max() == 255
    both = load(tmp_path, digits={"domain": "both"})
    assert both.hashes()[:4] == [
        parts[domain, "test"].hashes()[i] for i in (0, 1) for domain in ("upright", "rotated")
    ]
    assert both.labels is not None
    assert len(both.labels) == 2 * 797


def test_another_seed_gives_another_split(tmp_path: Path) -> None:
    assert load(tmp_path, digits={"seed": 0}).hashes() != load(tmp_path, digits={"seed": 1}).hashes()


def test_a_torchvision_dataset_on_disk_is_read(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels, labels = noise(6, 28, 28), np.arange(6, dtype=np.uint8)
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in pixels.shape)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            bytes([0, 0, 8, 1]) + (6).to_bytes(4, "big") + labels.tobytes()
        )
    assert datasets.MNIST(str(tmp_path), train=False)  # torchvision itself finds it
    images = load(tmp_path, torchvision="MNIST", root=".")
    assert images.shape == (1, 28, 28)
    assert (np.asarray(images.images)[:, 0] == pixels).all()
    assert images.labels is not None
    assert images.labels.tolist() == labels.tolist()


def test_torchvision_is_never_asked_to_download(tmp_path: Path) -> None:
    for name in ("CIFAR10", "SVHN", "ImageNet"):
        keys = {"torchvision": name, "root": ".", "split": "val" if name == "ImageNet" else "test"}
        message = refusal(tmp_path, **keys)
        assert f"torchvision {name} is not complete under {tmp_path}" in message
        assert "nothing is downloaded" in message
    assert not list(tmp_path.iterdir())
    assert "did you mean CIFAR10" in refusal(tmp_path, torchvision="CIFAR", root=".")
    assert "has the splits 'train' and 'test', not 'val'" in refusal(
        tmp_path, torchvision="CIFAR10", root=".", split="val"
    )


# Choosing and hashing ---------------------------------------------------------------------------------------


def test_limit_is_a_seeded_choice_in_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", x_test=noise(50, 4, 4), y_test=np.arange(50))
    chosen = [load(tmp_path, npz="set.npz", limit=10, seed=seed).labels for seed in (0, 0, 1)]
    assert chosen[0] is not None
    assert chosen[1] is not None
    assert chosen[2] is not None
    assert (chosen[0] == chosen[1]).all()
    assert (chosen[0] != chosen[2]).any()
    assert sorted(set(chosen[0].tolist())) == chosen[0].tolist()
    assert len(load(tmp_path, npz="set.npz", limit=100)) == 50


def test_kept_labels_are_kept_and_absent_ones_named(tmp_path: Path) -> None:
    images = load(tmp_path, digits={}, keep_labels=(5, 7), limit=20)
    assert images.labels is not None
    assert set(images.labels.tolist()) == {5, 7}
    assert "has no image with label 10, 11: keep_labels can name 0, 1, 2" in refusal(
        tmp_path, digits={}, keep_labels=(1, 10, 11)
    )


def test_content_hashes_tell_images_apart_but_not_grey_from_repeated_grey() -> None:
    grey = noise(1, 4, 4)
    assert content_hash(grey) == content_hash(np.repeat(grey, 3, 0))
    assert content_hash(grey) != content_hash(grey.reshape(1, 2, 8))
    assert content_hash(noise(3, 4, 4)) != content_hash(noise(3, 4, 4, seed=1))
    assert content_hash(grey) == hashlib.sha256(b"(1, 4, 4)" + grey.tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "give exactly one of folder, npz, webdataset, torchvision, digits; none is given"),
        ({"folder": "a", "npz": "b"}, "folder and npz are given"),
        ({"torchvision": "CIFAR10"}, "torchvision needs `root: FOLDER`"),
        ({"digits": {}, "keep_labels": ()}, "keep_labels is empty"),
        ({"digits": {"domain": "mirrored"}}, "Input should be 'upright', 'rotated' or 'both'"),
    ],
)
def test_contradictory_keys_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=re.escape(message)):
        ImageSpec.model_validate(keys)


def test_cifar_is_read(shared: Path, tmp_path: Path) -> None:
    images = load(tmp_path, npz=str(shared / "data" / "cifar10.npz"))
    assert (len(images), images.shape) == (2500, (3, 32, 32))
    assert images.classes is not None
    assert len(images.classes) == 10
    unlabelled = load(tmp_path, npz=str(shared / "data" / "imagenet_sample_64.npz"), x="x")
    assert (len(unlabelled), unlabelled.labels) == (1000, None)
