"""A folder of image files, decoded one at a time: found, sized, checked, and the broken ones named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from datafree.errors import UsageError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
BROKEN_SHARE = 0.1  # more broken files than this in a folder are refused
UNREADABLE = (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError)
_GREY_MODES = ("1", "L", "LA")
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_NAMED = 5


@dataclass(frozen=True)
class Framing:
    """How an image of any size becomes `size`: its shorter side is resized to size / crop, its centre cut."""

    size: tuple[int, int]
    crop: float
    interpolation: Literal["bilinear", "bicubic"]

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        scale = max(height / image.height, width / image.width) / self.crop
        across, down = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        if (across, down) != image.size:
            image = image.resize((across, down), _FILTERS[self.interpolation])
        left, top = (across - width) // 2, (down - height) // 2
        return image.crop((left, top, left + width, top + height))


class FileImages:
    """uint8 (C, H, W) images decoded from files on each access, all of one shape."""

    def __init__(self, paths: Sequence[Path], channels: int, framing: Framing) -> None:
        self.paths = tuple(paths)
        self.channels = channels
        self.framing = framing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> np.ndarray:
        with Image.open(self.paths[index]) as image:
            return pixels(image, self.channels, self.framing)

    def select(self, indices: Sequence[int]) -> FileImages:
        return FileImages([self.paths[index] for index in indices], self.channels, self.framing)


def pixels(image: Image.Image, channels: int, framing: Framing) -> np.ndarray:
    """uint8 (channels, H, W) of an opened image: turned as EXIF says, alpha dropped, framed.

    Raises one of UNREADABLE.
    """
    if image.mode in _DEEP_MODES:
        raise ValueError(f"{image.mode} pixels; only 8 bits per channel are read")
    upright = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    array = np.asarray(framing(upright), dtype=np.uint8)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


@dataclass(frozen=True)
class Listing:
    """Files of a folder and, where its subfolders are classes, the class of each."""

    paths: tuple[Path, ...]
    labels: np.ndarray | None
    classes: tuple[str, ...] | None


def list_folder(folder: Path) -> Listing:
    """Image files of `folder`, in sorted order: flat and unlabelled, or one subfolder per class.

    Raises UsageError for a folder that is missing, holds no image, or mixes both layouts.
    """
    if not folder.is_dir():
        raise UsageError(f"image folder {folder} {'is a file' if folder.exists() else 'does not exist'}")
    flat = sorted(path for path in folder.iterdir() if _is_image(path))
    nested = {
        child.name: sorted(path for path in child.rglob("*") if _is_image(path))
        for child in sorted(folder.iterdir())
        if child.is_dir()
    }
    nested = {name: paths for name, paths in nested.items() if paths}
    if flat and nested:
        raise UsageError(
            f"image folder {folder} holds {len(flat)} images itself and others in {len(nested)} subfolders: "
            "keep either all images flat, or one subfolder per class"
        )
    if flat:
        return Listing(tuple(flat), None, None)
    if not nested:
        raise UsageError(f"image folder {folder} holds no image ({', '.join(ENDINGS)})")
    labels = np.repeat(np.arange(len(nested)), [len(paths) for paths in nested.values()])
    return Listing(tuple(path for paths in nested.values() for path in paths), labels, tuple(nested))


@dataclass(frozen=True)
class Header:
    """What a file's first bytes say. size: (height, width) after turning"""

    size: tuple[int, int]
    grey: bool


def read_headers(paths: Sequence[Path]) -> tuple[list[Header | None], dict[Path, str]]:
    """The header of each file, None where it cannot be read, and the reasons by file. Nothing is decoded."""
    headers: list[Header | None] = []
    broken: dict[Path, str] = {}
    for path in paths:
        try:
            with Image.open(path) as image:
                headers.append(header_of(image))
        except UNREADABLE as error:
            headers.append(None)
            broken[path] = reason_of(error)
    return headers, broken


def header_of(image: Image.Image) -> Header:
    """Of an opened image, which is not decoded."""
    turned = _has_exif(image) and image.getexif().get(0x0112) in _TURNED
    height, width = (image.width, image.height) if turned else (image.height, image.width)
    return Header((height, width), image.mode in _GREY_MODES)


def find_broken(images: FileImages) -> dict[Path, str]:
    """Decode every image once; the reason for each that fails."""
    broken: dict[Path, str] = {}
    for index, path in enumerate(images.paths):
        try:
            images[index]
        except UNREADABLE as error:
            broken[path] = reason_of(error)
    return broken


def frame_of(headers: Sequence[Header], folder: Path) -> tuple[int, int]:
    """The one (height, width) of all images; raises UsageError asking for `size` where they differ."""
    sizes = Counter(header.size for header in headers)
    if len(sizes) > 1:
        shown = ", ".join(f"{height} x {width}" for (height, width), _ in sizes.most_common(3))
        raise UsageError(
            f"the images in {folder} have {len(sizes)} sizes ({shown}{', ...' if len(sizes) > 3 else ''}): "
            "say which they should get, for example `size: 224` (the shorter side is resized, the centre cut)"
        )
    return next(iter(sizes))


def judge_broken(broken: dict[Path, str], total: int, folder: Path) -> str | None:
    """A note that names the broken files, None if there is none; raises UsageError above BROKEN_SHARE."""
    if not broken:
        return None
    named = "; ".join(
        f"{path.relative_to(folder)}: {reason}" for path, reason in list(broken.items())[:_NAMED]
    )
    more = f"; and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
    if len(broken) > BROKEN_SHARE * total:
        raise UsageError(
            f"{len(broken)} of {total} image files in {folder} cannot be read, more than {BROKEN_SHARE:.0%}: "
            f"{named}{more}. Fetch them again or remove them"
        )
    return f"{len(broken)} of {total} image files in {folder} cannot be read and were skipped: {named}{more}"


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and path.is_file() and not path.name.startswith(".")


def _has_exif(image: Image.Image) -> bool:
    """Whether EXIF stands in the header; asking a PNG without any for them would decode the whole file."""
    return image.format == "TIFF" or not {"exif", "Raw profile type exif"}.isdisjoint(image.info)


def reason_of(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return "not an image" if isinstance(error, UnidentifiedImageError) else text
