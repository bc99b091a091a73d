"""A folder of image files, decoded one at a time: found, sized, checked, and the broken ones named."""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from datafree.errors import UsageError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
BROKEN_SHARE = 0.1  # more broken files than this in a folder are refused
MOST_LABEL = 1_000_000  # no network here has as many outputs, and lists of all labels are made
MOST_PIXELS = 2**26  # of an image as stored, and on its way to the size asked for: 200 MB in colour
UNREADABLE = (
    *(OSError, UnidentifiedImageError, SyntaxError, ValueError, EOFError, zlib.error, struct.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
    *(
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        OverflowError,
        ZeroDivisionError,
        RuntimeError,
        MemoryError,
    ),
)  # what Pillow's decoders raise on damaged files
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF")  # of ENDINGS
_GREY_MODES = ("1", "L", "LA")
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_NAMED = 5


@dataclass(frozen=True)
class Framing:
    """How an image of any size becomes `size`: its shorter side is resized to size / crop, its centre cut.

    Raises ValueError for a strip, or a crop so small, that the resized image would have over MOST_PIXELS.
    """

    size: tuple[int, int]
    crop: float
    interpolation: Literal["bilinear", "bicubic"]

    def covering(self, have: tuple[int, int]) -> tuple[int, int]:
        """(height, width) to which an image of size `have` is resized before its centre is cut out."""
        scale = max(self.size[0] / have[0], self.size[1] / have[1]) / self.crop
        down, across = max(self.size[0], round(have[0] * scale)), max(self.size[1], round(have[1] * scale))
        if across * down > MOST_PIXELS:
            raise ValueError(
                f"{have[1]} x {have[0]} pixels would become {across} x {down} before {self.size[1]} x {self.size[0]} "
                f"are cut out; at most {MOST_PIXELS:,} pixels are held"
            )
        return down, across

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        down, across = self.covering((image.height, image.width))
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
        with open_image(self.paths[index]) as image:
            return pixels(image, self.channels, self.framing)

    def select(self, indices: Sequence[int]) -> FileImages:
        return FileImages([self.paths[index] for index in indices], self.channels, self.framing)


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """The header of an image of one of our formats, by content; nothing is decoded.

    Only these: Pillow knows others, some of which start a program of the system. Raises one of UNREADABLE, also for an
    image of more than MOST_PIXELS.
    """
    image = Image.open(file, formats=_FORMATS)
    if image.width * image.height > MOST_PIXELS:
        with image:
            raise ValueError(f"{image.width} x {image.height} pixels; at most {MOST_PIXELS:,} are decoded")
    return image


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
    children = _children(folder)
    flat = [path for path in children if _is_image(path)]
    nested = {child.name: _images_under(child) for child in children if child.is_dir()}
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
            with open_image(path) as image:
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


def find_strips(paths: Sequence[Path], headers: Sequence[Header | None], framing: Framing) -> dict[Path, str]:
    """The files that cannot be framed, by their headers alone, and why."""
    broken: dict[Path, str] = {}
    for path, header in zip(paths, headers, strict=True):
        try:
            if header is not None:
                framing.covering(header.size)
        except ValueError as error:
            broken[path] = str(error)
    return broken


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


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UsageError(
            f"image folder {folder} cannot be read ({error.strerror}): change its permissions, or leave it out"
        ) from error


def _images_under(folder: Path) -> list[Path]:
    """Image files at any depth, sorted; linked folders are not entered, so that a circle of links ends."""

    def refuse(error: OSError) -> None:
        raise UsageError(
            f"image folder {error.filename} cannot be read ({error.strerror}): change its permissions, or leave it out"
        ) from error

    walk = os.walk(folder, onerror=refuse)
    return sorted(path for place, _, names in walk for name in names if _is_image(path := Path(place, name)))


def _is_image(path: Path) -> bool:
    """Whether a file should hold an image; what cannot be looked at (a link to nowhere) `read_headers` names."""
    if path.suffix.lower() not in ENDINGS or path.name.startswith("."):
        return False
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


def _has_exif(image: Image.Image) -> bool:
    """Whether EXIF stands in the header; asking a PNG without any for them would decode the whole file."""
    return image.format == "TIFF" or not {"exif", "Raw profile type exif"}.isdisjoint(image.info)


def reason_of(error: BaseException) -> str:
    text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return "not an image" if isinstance(error, UnidentifiedImageError) else text
