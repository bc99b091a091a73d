"""Images in webdataset tars, through the webdataset library: files of one sample share a name up to the first dot.

A sample is an image (`000017.jpg`) and, for labels, its class number as text (`000017.cls`). Tars are read in a stream:
once for names, sizes and labels, once more to decode what was chosen.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datafree.errors import UsageError
from datafree.image_files import ENDINGS, UNREADABLE, Framing, Header, header_of, pixels, reason_of

MOST = 50_000  # images read into memory without being asked for a limit


@dataclass(frozen=True)
class Sample:
    """An image of a tar. name: TAR/KEY, as messages name it; label: None where there is no .cls file"""

    name: Path
    data: bytes
    label: int | None


@dataclass(frozen=True)
class Index:
    """What the first pass found: all images, and of the sound ones the headers and labels, in order."""

    total: int
    names: tuple[Path, ...]
    headers: tuple[Header, ...]
    labels: np.ndarray | None
    broken: dict[Path, str]


def expand(pattern: str) -> list[Path]:
    """The tars that `folder/part-{000..012}.tar` names. Raises UsageError for one that is not there."""
    from_library = _library()
    paths = [Path(path) for path in from_library.shardlists.expand_urls(pattern)]
    absent = [path for path in paths if not path.is_file()]
    if absent:
        raise UsageError(
            f"webdataset {pattern}: {len(absent)} of {len(paths)} tars are not there, the first is {absent[0]}"
        )
    return paths


def index(paths: Sequence[Path]) -> Index:
    """Names, headers and labels of all images; nothing is decoded."""
    names, headers, labels, broken = [], [], [], {}
    total = 0
    for sample in samples(paths):
        total += 1
        try:
            with Image.open(io.BytesIO(sample.data)) as image:
                headers.append(header_of(image))
        except UNREADABLE as error:
            broken[sample.name] = reason_of(error)
            continue
        names.append(sample.name)
        labels.append(sample.label)
    if not total:
        raise UsageError(f"webdataset {paths[0]}: there is no image ({', '.join(ENDINGS)}) in the tars")
    known = [label for label in labels if label is not None]
    found = np.array(known, dtype=np.int64) if len(known) == len(labels) else None
    return Index(total, tuple(names), tuple(headers), found, broken)


def decode(
    paths: Sequence[Path], chosen: Callable[[Path], bool], channels: int, framing: Framing
) -> tuple[list[Path], list[np.ndarray], dict[Path, str]]:
    """The chosen images, uint8 (C, H, W), their names, and those that cannot be decoded."""
    names, images, broken = [], [], {}
    for sample in samples(paths):
        if not chosen(sample.name):
            continue
        try:
            with Image.open(io.BytesIO(sample.data)) as image:
                images.append(pixels(image, channels, framing))
        except UNREADABLE as error:
            broken[sample.name] = reason_of(error)
            continue
        names.append(sample.name)
    return names, images, broken


def samples(paths: Sequence[Path]) -> Iterator[Sample]:
    """Every sample that has an image, in order. Raises UsageError for a tar that cannot be read."""
    library = _library()
    for path in paths:  # one at a time, so that an error has a name
        dataset = library.WebDataset([str(path)], shardshuffle=False, empty_check=False)
        try:
            for parts in dataset:
                sample = _sample(path, parts)
                if sample is not None:
                    yield sample
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UsageError(f"webdataset {path} cannot be read as a tar ({error})") from error


def _sample(path: Path, parts: dict[str, Any]) -> Sample | None:
    ending = next((key for key in parts if f".{key.rsplit('.', 1)[-1].lower()}" in ENDINGS), None)
    if ending is None:
        return None
    name = path / f"{parts['__key__']}.{ending}"
    text = parts.get("cls")
    if text is None:
        return Sample(name, parts[ending], None)
    digits = text.decode("ascii", errors="replace").strip()
    if not digits.isdecimal():
        raise UsageError(f"webdataset {name}: its .cls file holds {digits[:20]!r}, not a class number from 0")
    return Sample(name, parts[ending], int(digits))


def _library() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise UsageError(
            "webdataset tars are read with the webdataset library, which is not installed: "
            "pip install 'datafree[webdataset]'"
        ) from error
    return webdataset
