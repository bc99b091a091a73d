"""Images in webdataset tars, through the webdataset library: files of one sample share a name up to the first dot.

A sample is an image (`000017.jpg`) and, for labels, its class number as text (`000017.cls`). Tars are read in a stream:
once for names, sizes and labels, once more to decode what was chosen. Before that their headers are looked at: plain
tars only, no file that is larger than MOST_FILE or stands in them twice.
"""

from __future__ import annotations

import io
import math
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datafree.errors import UsageError
from datafree.images.files import (
    ENDINGS,
    MOST_LABEL,
    UNREADABLE,
    Framing,
    Header,
    header_of,
    open_image,
    pixels,
    reason_of,
)

MOST = 50_000  # images read into memory without being asked for a limit
MOST_TARS = 10_000
MOST_FILE = 2**28  # bytes of one file in a tar
DAMAGE = (
    tarfile.TarError,
    OSError,
    EOFError,
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
)


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
    if _expanded(pattern) > MOST_TARS or "::" in pattern:
        raise UsageError(
            f"webdataset {_short(pattern)} names more than {MOST_TARS:,} tars, or joins patterns by '::'; give one "
            "pattern like folder/part-{000..012}.tar"
        )
    paths = [Path(path) for path in from_library.shardlists.expand_urls(pattern)]
    absent = [path for path in paths if not path.is_file()]
    if absent:
        raise UsageError(
            f"webdataset {_short(pattern)}: {len(absent)} of {len(paths)} tars are not there, the first is {absent[0]}"
        )
    return paths


def _expanded(pattern: str) -> float:
    """At least as many names as the braces of `pattern` stand for."""
    ranges = [(int(a), int(b)) for a, b in re.findall(r"\{(\d{1,18})\.\.(\d{1,18})(?:\.\.-?\d+)?\}", pattern)]
    if re.search(r"\d{19}", pattern):
        return math.inf
    lists = [inside.count(",") + 1 for inside in re.findall(r"\{([^{}]*,[^{}]*)\}", pattern)]
    letters = 60 ** len(re.findall(r"\{\w\.\.\w(?:\.\.-?\d+)?\}", pattern))
    return math.prod([*(abs(a - b) + 1.0 for a, b in ranges), *map(float, lists), float(letters)])


def _short(pattern: str) -> str:
    return pattern if len(pattern) <= 200 else pattern[:197] + "..."


def index(paths: Sequence[Path]) -> Index:
    """Names, headers and labels of all images; nothing is decoded."""
    names, headers, labels, broken = [], [], [], {}
    total = 0
    for path in paths:
        _refuse_strange(path)
    for sample in samples(paths):
        total += 1
        try:
            with open_image(io.BytesIO(sample.data)) as image:
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
            with open_image(io.BytesIO(sample.data)) as image:
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
        except DAMAGE as error:
            raise _unreadable(path, error) from error


def _refuse_strange(path: Path) -> None:
    """Look at the headers of a tar, which say how much memory its files will take."""
    seen: set[str] = set()
    try:
        with tarfile.open(path, "r:") as tar:  # no compression: a small file could unfold to anything
            while (member := tar.next()) is not None:
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue] - it keeps every header otherwise
                if member.issparse() or member.size > MOST_FILE:
                    raise UsageError(
                        f"webdataset {path}: {member.name[:100]} has {member.size:,} bytes, or holes; plain files of "
                        f"at most {MOST_FILE:,} bytes are read"
                    )
                if member.isfile() and member.name in seen:
                    raise UsageError(
                        f"webdataset {path}: {member.name[:100]} stands in it twice, so that samples cannot be told "
                        "apart: write the tar again"
                    )
                seen.add(member.name)
    except DAMAGE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UsageError:
    lines = str(error).splitlines()
    reason = lines[0][:200] if lines else type(error).__name__
    return UsageError(f"webdataset {path} cannot be read as a tar ({reason})")


def _sample(path: Path, parts: dict[str, Any]) -> Sample | None:
    ending = next((key for key in parts if f".{key.rsplit('.', 1)[-1].lower()}" in ENDINGS), None)
    if ending is None:
        return None
    name = path / f"{parts['__key__']}.{ending}"
    text = parts.get("cls")
    if text is None:
        return Sample(name, parts[ending], None)
    digits = text[:100].decode("ascii", errors="replace").strip()
    if not digits.isdecimal() or len(digits) > len(str(MOST_LABEL)) or int(digits) > MOST_LABEL:
        raise UsageError(
            f"webdataset {name}: its .cls file holds {digits[:20]!r}, not a class number from 0 to {MOST_LABEL:,}"
        )
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
