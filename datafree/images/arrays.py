"""Arrays of an .npz file, whose declared sizes are checked before anything is unpacked.

Such a file is a zip of .npy members. A member says how large it is three times: in the zip's directory, in its own
header, and by what follows; the first two must agree, and no more is read than they say. At most MOST_BYTES are read
into memory, and nothing that unfolds to more than MOST_RATIO times its size on disk, as no images do.
"""

from __future__ import annotations

import difflib
import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from datafree.errors import UsageError

MOST_BYTES = 8 * 10**9  # of one array
MOST_RATIO, RATIO_FROM = 200, 64 * 10**6  # arrays below RATIO_FROM bytes may unfold as they like
DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError),
    *(
        EOFError,
        OSError,
        ValueError,
        TypeError,
        KeyError,
        OverflowError,
        SyntaxError,
        RecursionError,
        MemoryError,
    ),
    RuntimeError,  # encrypted, or (a subclass of it) a method of compression that Python lacks
)  # what zipfile and numpy raise on damaged files


class Arrays:
    """The arrays of an opened .npz file; `read` unpacks one."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._path = path
        self._archive = archive
        self.names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]

    def read(self, name: str) -> np.ndarray:
        """Raises UsageError where there is no array `name`, or one that is damaged, pickled or too large."""
        if name not in self.names:
            near = difflib.get_close_matches(name, self.names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{self._path} has no array {name!r}; it has {_listed(self.names)}{hint}")
        with _readable(self._path, f", array {name!r},"):
            member = self._archive.getinfo(f"{name}.npy")
            self._refuse_large(name, member)
            with self._archive.open(member) as file:
                self._check_header(file, name, member)
            with self._archive.open(member) as file:
                array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
                file.read(1)  # the end, where zipfile compares the checksum
            return array

    def _refuse_large(self, name: str, member: zipfile.ZipInfo) -> None:
        size, stored = member.file_size, member.compress_size
        if size > MOST_BYTES:
            raise UsageError(
                f"image file {self._path}, array {name!r}, unfolds to {size:,} bytes; at most {MOST_BYTES:,} are read "
                "into memory: use a folder or webdataset tars"
            )
        if size > RATIO_FROM and size > MOST_RATIO * max(stored, 1):
            raise UsageError(
                f"image file {self._path}, array {name!r}, unfolds to {size:,} bytes from {stored:,}, more than "
                f"{MOST_RATIO} times as many, which no images do; it is not unpacked"
            )

    def _check_header(self, file: IO[bytes], name: str, member: zipfile.ZipInfo) -> None:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"version {version[0]}.{version[1]} of .npy is not known")
        shape, _, dtype = _HEADERS[version](file)
        if dtype.hasobject:
            raise UsageError(
                f"image file {self._path}, array {name!r}, holds pickled Python objects, which are not read: save "
                "plain arrays with np.savez"
            )
        left = member.file_size - file.tell()
        if min(shape, default=0) < 0 or not dtype.itemsize or math.prod(shape) * dtype.itemsize != left:
            said = f"{dtype} of shape {shape}"
            raise ValueError(f"its header says {said[:60]}, and {left:,} bytes follow")


_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@contextmanager
def open_arrays(path: Path) -> Iterator[Arrays]:
    """The arrays of the .npz file `path`. Raises UsageError, naming the file, for what is none."""
    if not path.is_file():
        raise UsageError(f"image file {path} does not exist")
    with _readable(path, ""), path.open("rb") as file:
        first = file.read(6)
    if first == b"\x93NUMPY":
        raise UsageError(
            f"{path} holds a single array: save images and labels with np.savez(x_test=..., y_test=...)"
        )
    with _readable(path, ""):
        archive = zipfile.ZipFile(path)
    with archive:
        yield Arrays(path, archive)


@contextmanager
def _readable(path: Path, part: str) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        lines = str(error).splitlines()
        reason = lines[0][:200] if lines else type(error).__name__
        raise UsageError(
            f"image file {path}{part} cannot be read as .npz ({reason}): save plain arrays with np.savez"
        ) from error


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:20]) or "none"
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown
