"""Arrays and photographs of DATAFREE_DATA, as uint8 (N, C, H, W) of one size. Nothing is copied into the project."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from benchmarks.pairs.group import Task
from datafree.errors import UsageError
from datafree.images.image_set import DigitsSpec, ImageSpec, load_images
from datafree.images.preprocess import match_channels
from datafree.seeds import derive_seed
from datafree.spec import DATA_VARIABLE

PROJECT = Path(__file__).resolve().parents[2]


def data_folder() -> Path:
    """Where real images and checkpoints lie. Raises UsageError where they do not."""
    folder = Path(os.environ.get(DATA_VARIABLE) or PROJECT.parent / "shared").expanduser().resolve()
    if not (folder / "data").is_dir():
        raise UsageError(
            f"no real images at {folder}: set {DATA_VARIABLE} to the folder that holds data/ and checkpoints/"
        )
    return folder


def read(file: str, key: str, side: int, channels: int = 3) -> tuple[np.ndarray, np.ndarray | None]:
    """Array `key` of `data/FILE.npz` as uint8 (N, channels, side, side), and its labels if it has some.

    Grey images are repeated over the channels; other sizes are resized, anti-aliased.
    """
    spec = ImageSpec(npz=str(data_folder() / "data" / f"{file}.npz"), x=key)
    found = load_images(spec, PROJECT)
    assert isinstance(found.images, np.ndarray)
    return resized(found.images, side, channels), found.labels


def resized(images: np.ndarray, side: int, channels: int) -> np.ndarray:
    pixels = match_channels(torch.from_numpy(images), channels)
    if pixels.shape[-1] != side:
        parts = [  # in parts, because floats take four times the memory
            functional.interpolate(part.float(), (side, side), mode="bilinear", antialias=True)
            for part in pixels.split(256)
        ]
        pixels = torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])
    return np.ascontiguousarray(pixels.numpy())


def photographs(folder: str) -> tuple[np.ndarray, np.ndarray]:
    """`data/imagenet224/FOLDER`: uint8 (500, 3, 224, 224), and the classes that the files' names say, int64."""
    path = data_folder() / "data" / "imagenet224" / folder
    found = load_images(ImageSpec(folder=str(path), size=224), PROJECT)
    names = sorted(file.stem for file in path.glob("*.jpg"))
    assert len(names) == len(found), f"{path}: {len(names)} names and {len(found)} sound images"
    return found.batch(range(len(found))).numpy(), np.array([int(name) for name in names], np.int64)


def npz_task(
    name: str,
    file: str,
    side: int,
    expert: str | None = None,
    *,
    prefix: str = "",
    first: int = 0,
    last: int | None = None,
) -> Callable[[], Task]:
    """The test split of an .npz as a task; classes from `first` to `last` alone, counted from `first`."""

    def load() -> Task:
        images, labels = read(file, f"{prefix}x_test", side)
        assert labels is not None
        chosen = (labels >= first) & (labels <= (labels.max() if last is None else last))
        return Task(name, images[chosen], labels[chosen] - first, expert)

    return load


def photographs_task() -> Task:
    images, labels = photographs("evaluation")
    return Task("imagenet", images, labels, None)


def real_photographs() -> np.ndarray:
    return photographs("proxies")[0]


def digits_task(name: str, expert: str | None, digits: tuple[int, ...]) -> Callable[[], Task]:
    """The test split of scikit-learn's digits, 8 x 8 and grey; only `digits`, counted from the first of them."""

    def load() -> Task:
        found = load_images(ImageSpec(digits=DigitsSpec(split="test"), keep_labels=digits), PROJECT)
        assert found.labels is not None
        return Task(name, found.batch(range(len(found))).numpy(), found.labels - digits[0], expert)

    return load


def digits_training() -> np.ndarray:
    found = load_images(ImageSpec(digits=DigitsSpec(split="train")), PROJECT)
    return found.batch(range(len(found))).numpy()


def training_images(domains: Sequence[str], side: int, file: str = "") -> Callable[[], np.ndarray]:
    """The training images of several domains, as many of each, in turn, in seeded order.

    domains: files of their own, or what their arrays in the one `file` begin with
    """

    def load() -> np.ndarray:
        places = [(file, f"{name}_x_train") if file else (name, "x_train") for name in domains]
        return mixed([read(*place, side)[0] for place in places])

    return load


def mixed(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """As many images of every array as the smallest has, one of each in turn, each array in a seeded order."""
    count = min(map(len, arrays))
    orders = [
        np.random.default_rng(derive_seed(0, "pairs", "order", str(number))).permutation(len(array))[:count]
        for number, array in enumerate(arrays)
    ]
    chosen = np.stack([array[order] for array, order in zip(arrays, orders, strict=True)], 1)
    return chosen.reshape(-1, *chosen.shape[2:])


def public_photographs(side: int, channels: int = 3) -> Callable[[], np.ndarray]:
    """1,000 ImageNet thumbnails and as many images of CIFAR-100, in turn."""

    def load() -> np.ndarray:
        thumbnails, _ = read("imagenet_sample_64", "x", side, channels)
        return mixed([thumbnails, read("cifar100", "x_train", side, channels)[0]])

    return load


def public_besides_imagenet() -> np.ndarray:
    """Photographs for networks judged on ImageNet: PACS's and CIFAR-100's at 64 px, in turn.

    The thumbnails are left out: half of them are the photographs that judge, the other half the real images.
    """
    pacs = np.concatenate([read("pacs64", f"photo_x_{split}", 64)[0] for split in ("train", "test")])
    return mixed([pacs, read("cifar100", "x_train", 64)[0]])
