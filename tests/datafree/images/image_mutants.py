"""Image files, arrays and tars as they come out of broken disks and bad intentions: seeded damage to sound ones."""

from __future__ import annotations

import io
import random
import tarfile
import zipfile
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image

FORMATS = {
    "jpg": "JPEG",
    "png": "PNG",
    "bmp": "BMP",
    "webp": "WEBP",
    "tif": "TIFF",
    "ppm": "PPM",
    "gif": "GIF",
}


def flipped(content: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, most of them near the start, where the headers are."""
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8, 40])):
        reach = len(changed) if chance.random() < 0.5 else min(len(changed), 120)
        changed[chance.randrange(reach)] = chance.choice([0, 255, 128, chance.randrange(256)])
    return bytes(changed)


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def spliced(content: bytes, chance: random.Random) -> bytes:
    """A piece taken out, or put in twice."""
    start, end = sorted(chance.randrange(len(content)) for _ in range(2))
    return content[:start] + content[end:] if chance.random() < 0.5 else content[:end] + content[start:]


def garbage(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.choice([0, 2, 8, 30])] + chance.randbytes(chance.choice([0, 1, 200]))


HARMS: list[Callable[[bytes, random.Random], bytes]] = [flipped, flipped, flipped, cut, spliced, garbage]


def damaged(content: bytes, number: int) -> bytes:
    chance = random.Random(number)
    return chance.choice(HARMS)(content, chance)


def _pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(0, 256, shape, dtype=np.uint8)


@cache
def sound_images() -> dict[str, bytes]:
    """One file per format and mode, by name; 12 x 9 pixels, with what else a header may carry."""
    images: dict[str, bytes] = {}
    exif = Image.Exif()
    exif[0x0112] = 6
    for ending, kind in FORMATS.items():
        for mode in ("RGB", "L", "P", "1", "RGBA", "CMYK"):
            buffer = io.BytesIO()
            try:
                Image.fromarray(_pixels(9, 12, 3)).convert(mode).save(buffer, kind, **_options(kind, exif))
            except (OSError, ValueError):
                continue  # this format has no such mode
            images[f"{mode}.{ending}"] = buffer.getvalue()
    buffer = io.BytesIO()
    Image.fromarray(_pixels(9, 12, 3)).save(buffer, "TIFF", compression="tiff_lzw")
    return images | {"lzw.tif": buffer.getvalue()}


def _options(kind: str, exif: Image.Exif) -> dict[str, object]:
    return {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}


@cache
def sound_arrays(compressed: bool) -> bytes:
    buffer = io.BytesIO()
    save = np.savez_compressed if compressed else np.savez
    save(buffer, x_test=_pixels(6, 5, 4, 3), y_test=np.arange(6), classes=np.array(list("abcdef")))
    return buffer.getvalue()


def npy(header: bytes, data: bytes = b"") -> bytes:
    """An .npy file with this header, whatever it says."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def npz(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tar(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@cache
def sound_tar() -> bytes:
    """Twelve labelled images."""
    members: list[tuple[str, bytes]] = []
    for number in range(12):
        members += [
            (f"{number:03}.png", sound_images()["RGB.png"]),
            (f"{number:03}.cls", str(number % 3).encode()),
        ]
    return tar(members)
