"""Images for evaluation, for proxies and for the oracle: a section of a recipe becomes one uint8 `ImageSet`.

Exactly one source per section: `folder`, `npz`, `torchvision` (already on disk) or `digits` (scikit-learn's).
Nothing is ever downloaded. Images stay as stored, uint8 (C, H, W); each network's `Preprocess` does the rest.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from torch import Tensor

from datafree.errors import UsageError
from datafree.images import files as image_files
from datafree.images import tars
from datafree.images.arrays import open_arrays
from datafree.images.files import MOST_LABEL, FileImages, Framing
from datafree.images.labels import LabelsSpec, find_labels, name_classes
from datafree.images.preprocess import MOST_SIDE
from datafree.seeds import derive_seed
from datafree.spec import Spec, resolve_path

SOURCES = ("folder", "npz", "webdataset", "torchvision", "digits")
DIGITS_TRAIN = 1000  # of scikit-learn's 1,797 digits; the others are the test split


class DigitsSpec(Spec):
    """scikit-learn's 1,797 handwritten digits, 8 x 8, grey; the split is fixed by `seed`.

    domain: "upright" as stored (light on dark); "rotated" inverted (dark on light) and turned by 90 degrees;
            "both" every digit in both, one after the other
    """

    domain: Literal["upright", "rotated", "both"] = "upright"
    split: Literal["train", "test"] = "test"
    seed: int = 0


class ImageSpec(Spec):
    """Where images come from, and which of them.

    folder:      flat, or one subfolder per class; `size`, `crop`, `interpolation` frame unequal images
    labels:      of a folder's images, where its subfolders are not all classes in order, see
                 `datafree.images.labels`: {pattern: '(\\d+)\\.jpg'}, {file: classes.csv}, {map: {n01440764: 0}}
    npz:         arrays `x` (uint8; N,H,W or N,H,W,C or N,C,H,W) and `y` (default: x's name with y for x)
    webdataset:  tars, `folder/part-{000..012}.tar`, read into memory; needs datafree[webdataset]
    torchvision: name of a dataset that lies under `root`, with its `split`
    digits:      scikit-learn's bundled digits
    keep_labels: only images with these labels           limit: at most so many, a seeded choice among all
    """

    folder: str | None = None
    labels: LabelsSpec | None = None
    npz: str | None = None
    webdataset: str | None = None
    torchvision: str | None = None
    digits: DigitsSpec | None = None
    x: str = "x_test"
    y: str | None = None
    root: str | None = None
    split: str = "test"
    size: int | tuple[int, int] | None = None
    crop: float = pydantic.Field(default=1.0, gt=0, le=1)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    keep_labels: tuple[int, ...] | None = None
    limit: int | None = pydantic.Field(default=None, ge=1)
    seed: int = 0

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> ImageSpec:
        sides = (self.size,) if isinstance(self.size, int) else self.size or (1,)
        if not all(1 <= side <= MOST_SIDE for side in sides):
            raise ValueError(f"size is {self.size}: give height and width in pixels, from 1 to {MOST_SIDE:,}")
        given = [key for key in SOURCES if getattr(self, key) is not None]
        if len(given) != 1:
            found = f"{' and '.join(given)} are given" if given else "none is given"
            raise ValueError(f"give exactly one of {', '.join(SOURCES)}; {found}")
        if self.torchvision is not None and self.root is None:
            raise ValueError(
                "torchvision needs `root: FOLDER`, where the dataset lies on disk; nothing is downloaded"
            )
        if self.labels is not None and self.folder is None:
            raise ValueError(f"labels are for images of a `folder`; {given[0]} brings its own")
        if self.keep_labels is not None and not self.keep_labels:
            raise ValueError("keep_labels is empty: name at least one label, or leave the key out")
        return self


@dataclass(frozen=True)
class ImageSet:
    """Images of one size and one number of channels.

    images: uint8 (N, C, H, W) in memory, or files decoded on access
    labels: int64 (N,), or None            classes: label names, or None            notes: one sentence each
    """

    name: str
    images: np.ndarray | FileImages
    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.images[0].shape
        return channels, height, width

    def batch(self, indices: Iterable[int]) -> Tensor:
        """uint8 (n, C, H, W)."""
        return torch.from_numpy(np.stack([self.images[int(index)] for index in indices]))

    def hashes(self) -> list[str]:
        """`content_hash` of every image, in order."""
        return [content_hash(self.images[index]) for index in range(len(self))]

    def select(self, indices: np.ndarray) -> ImageSet:
        """The images at `indices` (int64), in that order."""
        if isinstance(self.images, FileImages):
            images: np.ndarray | FileImages = self.images.select(indices.tolist())
        else:
            images = self.images[indices]
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, images=images, labels=labels)


def load_images(spec: ImageSpec, base: Path, *, verify: bool = True) -> ImageSet:
    """The images that a recipe's section describes; relative paths start from folder `base`.

    verify: decode every file once, so that broken ones are found now; False only reads headers (enough for a
    check) Raises UsageError for sources that are missing, malformed, or empty after `keep_labels`.
    """
    if spec.webdataset is not None:  # only what is chosen is decoded
        return _webdataset(spec, spec.webdataset, base)
    images = _read(spec, base, verify)
    chosen = _chosen(spec, images.name, images.labels, len(images))
    return images if len(chosen) == len(images) else images.select(chosen)


def _chosen(spec: ImageSpec, name: str, labels: np.ndarray | None, count: int) -> np.ndarray:
    """Which of `count` images `keep_labels` and `limit` leave, int64, in order."""
    chosen = np.arange(count)
    if spec.keep_labels is not None:
        chosen = _kept(name, labels, spec.keep_labels)
    if spec.limit is not None and spec.limit < len(chosen):
        generator = np.random.default_rng(derive_seed(spec.seed, "image limit"))
        chosen = np.sort(generator.choice(chosen, spec.limit, replace=False))
    return chosen


def content_hash(image: np.ndarray) -> str:
    """SHA-256 of shape and pixels of a uint8 (C, H, W) image; RGB with equal channels counts as grey."""
    if image.shape[0] == 3 and (image[0] == image[1]).all() and (image[0] == image[2]).all():
        image = image[:1]
    return hashlib.sha256(f"{image.shape}".encode() + np.ascontiguousarray(image).tobytes()).hexdigest()


def _read(spec: ImageSpec, base: Path, verify: bool) -> ImageSet:
    if spec.digits is not None:
        return digits(spec.digits)
    if spec.npz is not None:
        return _npz(spec, resolve_path(spec.npz, base))
    if spec.torchvision is not None:
        return _torchvision(spec, spec.torchvision, resolve_path(spec.root or "", base))
    assert spec.folder is not None
    return _folder(spec, resolve_path(spec.folder, base), base, verify)


def _kept(name: str, known: np.ndarray | None, labels: tuple[int, ...]) -> np.ndarray:
    if known is None:
        raise UsageError(f"{name} has no labels, so keep_labels cannot choose among them: remove keep_labels")
    present = set(np.unique(known).tolist())
    absent = sorted(set(labels) - present)
    if absent:
        raise UsageError(
            f"{name} has no image with label {', '.join(map(str, absent))}: "
            f"keep_labels can name {', '.join(map(str, sorted(present)))}"
        )
    return np.flatnonzero(np.isin(known, labels))


# The sources
# -----------------------------------------------------------------------------------------------------------


def digits(spec: DigitsSpec) -> ImageSet:
    """scikit-learn's digits in one domain, uint8 (1, 8, 8)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError(
            "the digits come with scikit-learn, which is not installed: pip install 'datafree[quickstart]'"
        ) from error
    stored: Any = load_digits()
    values: np.ndarray = stored["images"]  # float, 0 to 16
    images = np.round(values * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(derive_seed(spec.seed, "digits split")).permutation(len(images))
    chosen = order[:DIGITS_TRAIN] if spec.split == "train" else order[DIGITS_TRAIN:]
    upright, labels = images[chosen], np.asarray(stored["target"], dtype=np.int64)[chosen]
    rotated = np.rot90(255 - upright, axes=(1, 2))
    if spec.domain == "both":
        images, labels = np.stack([upright, rotated], 1).reshape(-1, *upright.shape[1:]), labels.repeat(2)
    else:
        images = upright if spec.domain == "upright" else rotated
    name = f"digits ({spec.domain}, {spec.split})"
    return ImageSet(name, np.ascontiguousarray(images[:, None]), labels, tuple("0123456789"))


def _npz(spec: ImageSpec, path: Path) -> ImageSet:
    with open_arrays(path) as arrays:
        x = arrays.read(spec.x)
        y_name = spec.y if spec.y is not None else _label_key(spec.x, arrays.names)
        y = None if y_name is None else arrays.read(y_name)
        names = arrays.read("classes") if "classes" in arrays.names and y is not None else None
    images = _channels_first(x, f"{path}, key {spec.x!r}")
    labels = None if y is None else _labels(y, len(images), f"{path}, key {y_name!r}")
    classes = None if names is None or labels is None else _classes(names, labels, path)
    return ImageSet(f"{path.name} ({spec.x})", images, labels, classes)


def _classes(names: np.ndarray, labels: np.ndarray, path: Path) -> tuple[str, ...]:
    if names.ndim != 1 or names.dtype.kind not in "USiu" or len(names) <= labels.max():
        raise UsageError(
            f"{path}, key 'classes': names are {names.dtype} of shape {names.shape}; one text per class is needed, and "
            f"the largest label is {labels.max()}"
        )
    return tuple(str(name) for name in names)


def _label_key(x: str, keys: Sequence[str]) -> str | None:
    """x_test -> y_test, photo_x_train -> photo_y_train; None where there is no such array (unlabelled)."""
    parts = ["y" if part == "x" else part for part in x.split("_")]
    name = "_".join(parts)
    return name if name in keys and name != x else None


def _channels_first(x: np.ndarray, where: str) -> np.ndarray:
    if x.dtype != np.uint8:
        raise UsageError(
            f"{where}: images are {x.dtype}, uint8 from 0 to 255 is needed; convert them once and save again"
        )
    if x.ndim and x.size == 0:
        raise UsageError(f"{where}: there is no image in the array")
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] not in (1, 3):
        return x
    raise UsageError(
        f"{where}: shape {x.shape} is none of (N, H, W), (N, H, W, C) and (N, C, H, W) with C = 1 or 3"
    )


def _labels(y: np.ndarray, count: int, where: str) -> np.ndarray:
    if y.shape != (count,) or not np.issubdtype(y.dtype, np.integer) or (y < 0).any():
        raise UsageError(
            f"{where}: labels are {y.dtype} of shape {y.shape}; {count} integers from 0 are needed, one per "
            "image"
        )
    if y.max() > MOST_LABEL:
        raise UsageError(
            f"{where}: the largest label is {y.max()}; a label is the number of an output, at most {MOST_LABEL:,}"
        )
    return y.astype(np.int64)


def _folder(spec: ImageSpec, folder: Path, base: Path, verify: bool) -> ImageSet:
    listing = image_files.list_folder(folder)
    known, classes = listing.labels, listing.classes
    if spec.labels is not None:
        known = find_labels(spec.labels, base, folder, listing.paths)
        classes = name_classes(known, folder, listing.paths)
    headers, broken = image_files.read_headers(listing.paths)
    image_files.judge_broken(broken, len(listing.paths), folder)
    sound = [header for header in headers if header is not None]
    size = spec.size if spec.size is not None else image_files.frame_of(sound, folder)
    framing = Framing((size, size) if isinstance(size, int) else size, spec.crop, spec.interpolation)
    broken |= image_files.find_strips(listing.paths, headers, framing)
    channels = 1 if all(header.grey for header in sound) else 3
    files = FileImages([path for path in listing.paths if path not in broken], channels, framing)
    if verify:
        broken |= image_files.find_broken(files)
    note = image_files.judge_broken(broken, len(listing.paths), folder)
    kept = np.array([index for index, path in enumerate(listing.paths) if path not in broken], dtype=np.int64)
    images = FileImages([listing.paths[int(index)] for index in kept], channels, framing)
    labels = None if known is None else known[kept]
    return ImageSet(folder.name, images, labels, classes, (note,) if note else ())


def _webdataset(spec: ImageSpec, pattern: str, base: Path) -> ImageSet:
    paths = tars.expand(str(resolve_path(pattern, base)))
    folder, name = paths[0].parent, Path(pattern).name
    found = tars.index(paths)
    image_files.judge_broken(found.broken, found.total, folder)
    chosen = _chosen(spec, name, found.labels, len(found.names))
    if len(chosen) > tars.MOST:
        raise UsageError(
            f"{name} has {len(chosen):,} images, which would be read into memory: say how many are wanted, "
            "for example `limit: 5000`"
        )
    size = spec.size if spec.size is not None else image_files.frame_of(found.headers, folder)
    framing = Framing((size, size) if isinstance(size, int) else size, spec.crop, spec.interpolation)
    channels = 1 if all(header.grey for header in found.headers) else 3
    wanted = {found.names[index]: index for index in chosen.tolist()}
    names, images, broken = tars.decode(paths, wanted.__contains__, channels, framing)
    note = image_files.judge_broken(found.broken | broken, found.total, folder)
    if not images:
        raise UsageError(f"none of the {len(chosen)} images chosen from {name} can be decoded")
    labels = None if found.labels is None else found.labels[[wanted[name] for name in names]]
    return ImageSet(name, np.stack(images), labels, None, (note,) if note else ())


def _torchvision(spec: ImageSpec, name: str, root: Path) -> ImageSet:
    dataset = _torchvision_dataset(spec, name, root)
    first, _ = dataset[0]
    channels = 1 if first.mode in ("1", "L") else 3
    size = spec.size if spec.size is not None else (first.height, first.width)
    framing = Framing((size, size) if isinstance(size, int) else size, spec.crop, spec.interpolation)
    images, labels = [], []
    for index in range(len(dataset)):
        image, label = dataset[index]
        if spec.size is None and (image.height, image.width) != framing.size:
            raise UsageError(
                f"torchvision {name} has images of several sizes: say which they should get, `size: 224`"
            )
        images.append(image_files.pixels(image, channels, framing))
        labels.append(label)
    classes = getattr(dataset, "classes", None)
    names = tuple(map(str, classes)) if classes is not None else None
    where = f"torchvision {name}"
    return ImageSet(
        f"{name} ({spec.split})", np.stack(images), _labels(np.array(labels), len(images), where), names
    )


def _torchvision_dataset(spec: ImageSpec, name: str, root: Path) -> Any:
    from torchvision import datasets

    known = [key for key in datasets.__all__ if _split_parameter(getattr(datasets, key)) is not None]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UsageError(f"torchvision has no image classification dataset {name!r} that is read here{hint}")
    maker: Callable[..., Any] = getattr(datasets, name)
    if _split_parameter(maker) == "train":
        if spec.split not in ("train", "test"):
            raise UsageError(f"torchvision {name} has the splits 'train' and 'test', not {spec.split!r}")
        choice: dict[str, Any] = {"train": spec.split == "train"}
    else:
        choice = {"split": spec.split}
    if "download" in inspect.signature(maker).parameters:
        choice["download"] = False
    try:
        return maker(root=str(root), **choice)
    except (RuntimeError, FileNotFoundError, ValueError) as error:
        raise UsageError(
            f"torchvision {name} is not complete under {root} ({str(error).splitlines()[0]}): put it there "
            "first; "
            "nothing is downloaded"
        ) from error


def _split_parameter(maker: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(maker).parameters
    return next((key for key in ("train", "split") if key in parameters), None)
