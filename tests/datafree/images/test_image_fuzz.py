"""Damaged images, arrays and tars: read or refused by name; and those made to fill the memory, refused in little."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datafree.errors import UsageError
from datafree.images import files as image_files
from datafree.images.image_set import ImageSpec, load_images
from tests.datafree.images.image_mutants import (
    damaged,
    npy,
    npz,
    sound_arrays,
    sound_images,
    sound_tar,
    tar,
)

MUTANTS = 250  # of images; as many of arrays, and of tars a third
MEMORY = 2 * 1024**3


def refusal(base: Path, **keys: Any) -> str | None:
    try:
        load_images(ImageSpec.model_validate(keys), base)
    except UsageError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", ["image", "npz", "tar"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused_by_name(kind: str, tmp_path: Path) -> None:
    refused, total = 0, MUTANTS // 3 if kind == "tar" else MUTANTS
    if kind == "tar":
        pytest.importorskip("webdataset")
    for number in range(total):
        if kind == "image":
            name, content = list(sound_images().items())[number % len(sound_images())]
            path = tmp_path / f"x.{name.split('.')[1]}"
            keys: dict[str, Any] = {"folder": ".", "size": 8}
        elif kind == "npz":
            path, content, keys = tmp_path / "a.npz", sound_arrays(number % 2 == 0), {"npz": "a.npz"}
        else:
            path, content, keys = tmp_path / "a.tar", sound_tar(), {"webdataset": "a.tar", "size": 8}
        path.write_bytes(damaged(content, number))
        message = refusal(tmp_path, **keys)
        refused += message is not None
        assert message is None or path.name in message, f"mutant {number}: {message}"
        assert len(message or "") < 3000
        path.unlink()
    assert 0.2 * total < refused


def test_undamaged_files_are_read(tmp_path: Path) -> None:
    for name, content in sound_images().items():
        (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path, folder=".", size=8) is None
    (tmp_path / "a.npz").write_bytes(sound_arrays(True))
    assert refusal(tmp_path, npz="a.npz") is None


# Bombs: headers that promise much, and files that unfold to it -----------------------------------------------


def png(width: int, height: int) -> bytes:
    """A grey PNG that says it has this many pixels, and none."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def deflated(name: str, size: int) -> bytes:
    """An .npz whose array of `size` zeros takes a thousandth of them on disk."""
    buffer = io.BytesIO()
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size // 10000}, 100, 100)}}\n".encode()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(f"{name}.npy", "w", force_zip64=True) as file,
    ):
        file.write(npy(header))
        for _ in range(size // 10**7):
            file.write(bytes(10**7))
    return buffer.getvalue()


def sparse_tar() -> bytes:
    """A tar of 2 kB with a file of 7 GB, all of it a hole."""
    entry = tarfile.TarInfo("0.png")
    content = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    content[156:157] = tarfile.GNUTYPE_SPARSE
    content[483:495] = b"%011o\0" % (7 * 2**30)
    content[148:156] = b"        "
    content[148:156] = b"%06o\0 " % sum(content)
    return bytes(content) + bytes(1024)


HOSTILE = """\
import json, sys
from pathlib import Path
from datafree.errors import UsageError
from datafree.images.image_set import ImageSpec, load_images
for keys in json.loads(sys.argv[1]):
    try:
        load_images(ImageSpec.model_validate(keys), Path.cwd())
        print("taken", keys)
    except UsageError as error:
        print(error)
"""


def test_what_would_fill_the_memory_is_refused_in_little(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    huge = b"{'descr': '|u1', 'fortran_order': False, 'shape': (10000000000000, 1, 1)}\n"
    files = {
        "wide/a.png": png(60_000, 60_000),
        "large/a.png": png(9000, 9000),
        "deflate.npz": deflated("x_test", 4 * 10**8),
        "header.npz": npz({"x_test.npy": npy(huge)}),
        "labels.npz": npz(
            {"x_test.npy": npy(huge.replace(b"10000000000000", b"2"), b"ab"), "y_test.npy": npy(b"((" * 4000)}
        ),
        "sparse.tar": sparse_tar(),
        "zipped.tar": zlib.compress(bytes(10**6), wbits=31),
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "strip").mkdir()
    Image.fromarray(np.zeros((1, 60_000), np.uint8)).save(tmp_path / "strip" / "a.png")
    (tmp_path / "small").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "small" / "a.png")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"folder": "wide"}, "Image size (3600000000 pixels) exceeds limit"),
        ({"folder": "large"}, "a.png: 9000 x 9000 pixels; at most 67,108,864 are decoded. Fetch"),
        ({"folder": "strip", "size": 224}, "60000 x 1 pixels would become 13440000 x 224 before 224 x 224 are cut out"),
        ({"folder": "small", "size": 8, "crop": 1e-6}, "8 x 8 pixels would become 8000000 x 8000000 before 8 x 8"),
        ({"npz": "deflate.npz"}, "array 'x_test', unfolds to 400,000,"),
        ({"npz": "header.npz"}, "its header says uint8 of shape (10000000000000, 1, 1), and 0 bytes follow"),
        ({"npz": "labels.npz"}, "labels.npz, array 'y_test', cannot be read as .npz ("),
        ({"webdataset": "sparse.tar"}, "0.png has 7,516,192,768 bytes, or holes; plain files of at most 268"),
        ({"webdataset": "zipped.tar"}, "zipped.tar cannot be read as a tar ("),
        ({"webdataset": "{0..99999999999}.tar"}, "names more than 10,000 tars"),
        ({"webdataset": "{a,b}" * 30 + ".tar"}, "names more than 10,000 tars"),
    ]  # fmt: skip

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))

    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, json.dumps([keys for keys, _ in cases])],
        capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path, preexec_fn=limit,
        env=_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases), done.stdout
    for line, (keys, message) in zip(lines, cases, strict=True):
        assert message in line, keys


def _environment() -> dict[str, str]:
    project = str(Path(__file__).resolve().parents[3])
    return {**os.environ, "PYTHONPATH": project, "PYTHONWARNINGS": "ignore"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"size": 100_000}, "size is 100000: give height and width in pixels, from 1 to 4,096"),
        ({"size": (8, 0)}, "size is (8, 0): give height and width in pixels, from 1 to 4,096"),
    ],
)
def test_sizes_that_no_network_has(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ImageSpec.model_validate({"folder": ".", **keys})
    assert message in str(caught.value)


# Arrays that are no sets of images ----------------------------------------------------------------------------


IMAGES = np.zeros((2, 4, 5), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_test": np.uint8(3)}, "shape () is none of (N, H, W), (N, H, W, C) and (N, C, H, W)"),
        ({"x_test": np.zeros((2, 0, 5), np.uint8)}, "there is no image in the array"),
        ({"x_test": IMAGES, "y_test": 3}, "labels are int64 of shape (); 2 integers from 0 are needed"),
        ({"x_test": IMAGES, "y_test": [0, 10**9]}, "the largest label is 1000000000; a label is the"),
        ({"x_test": IMAGES, "y_test": np.array([0, 2**64 - 1], np.uint64)}, "largest label is 18446744073709551615"),
        ({"x_test": IMAGES, "y_test": [0, 1e20]}, "labels are float64 of shape (2,); 2 integers from 0 are needed"),
        ({"x_test": IMAGES, "y_test": [0, 3], "classes": ["a"]}, "names are <U1 of shape (1,);"),
        ({"x_test": IMAGES, "y_test": [0, 0], "classes": "a"}, "names are <U1 of shape ();"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_images_and_labels(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    said = refusal(tmp_path, npz="a.npz")
    assert said is not None
    assert said.startswith(f"{tmp_path}/a.npz, key ")
    assert message in said


def test_archives_that_are_not_opened(tmp_path: Path) -> None:
    plain = npz(
        {"x_test.npy": npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, 2)}\n", b"ab")},
        zipfile.ZIP_STORED,
    )
    central = plain.rindex(b"PK\x01\x02")

    def changed(flag: int, method: int) -> bytes:
        content = bytearray(plain)
        content[6] = content[central + 8] = flag
        content[8] = content[central + 10] = method
        return bytes(content)

    for name, content, message in (
        ("encrypted", changed(1, 0), "is encrypted, password required"),
        ("unknown", changed(0, 97), "That compression method is not supported"),
        ("checksum", plain.replace(b"ab", b"ac"), "Bad CRC-32 for file 'x_test.npy'"),
        ("empty", b"", "File is not a zip file"),
        ("nothing", npz({}), "has no array 'x_test'; it has none"),
    ):
        (tmp_path / f"{name}.npz").write_bytes(content)
        said = refusal(tmp_path, npz=f"{name}.npz")
        assert said is not None, name
        assert said.startswith((f"image file {tmp_path}/{name}.npz", f"{tmp_path}/{name}.npz has no"))
        assert message in said


# Folders and tars ---------------------------------------------------------------------------------------------


def test_a_strip_is_found_without_decoding(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((1, 60_000), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="60000 x 1 pixels would become 13440000 x 224"):
        load_images(ImageSpec(folder=".", size=224), tmp_path, verify=False)


def test_circles_of_links_end_and_links_to_nowhere_are_named(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(sound_images()["RGB.png"])
    (tmp_path / "cat" / "again").symlink_to(tmp_path)
    assert refusal(tmp_path, folder=".") is None
    (tmp_path / "cat" / "2.png").symlink_to("2.png")
    said = refusal(tmp_path, folder=".")
    assert said is not None
    assert "1 of 2 image files" in said
    assert "cat/2.png: [Errno 40] Too many levels of symbolic links" in said
    (tmp_path / "circle").symlink_to("circle")
    said = refusal(tmp_path, folder="circle")
    assert said is not None
    assert "circle" in said


def test_folders_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cat").mkdir()

    def forbidden(*_: object) -> Any:
        raise PermissionError(13, "Permission denied", str(tmp_path / "cat"))

    monkeypatch.setattr(image_files.os, "scandir", forbidden)
    said = refusal(tmp_path, folder=".")
    assert said == (
        f"image folder {tmp_path}/cat cannot be read (Permission denied): change its permissions, or leave it out"
    )
    monkeypatch.setattr(Path, "iterdir", forbidden)
    assert refusal(tmp_path, folder=".") == (
        f"image folder {tmp_path} cannot be read (Permission denied): change its permissions, or leave it out"
    )


def test_only_formats_of_images_are_opened(tmp_path: Path) -> None:
    """Pillow would hand PostScript to a program of the system, whatever the file is called."""
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    )
    assert "1 of 1 image files" in (refusal(tmp_path, folder=".") or "")
    assert "a.png: not an image" in (refusal(tmp_path, folder=".") or "")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.png", b"?"), ("2.png", b"?"), ("1.png", b"!")], "1.png stands in it twice"),
        ([("1.png", b"?"), ("1.cls", b"7" * 5000)], "its .cls file holds '77777777777777777777',"),
        ([("1.png", b"?"), ("1.cls", b"1000001")], "its .cls file holds '1000001', not a class number from 0"),
    ],
)  # fmt: skip
def test_tars_that_cannot_be_meant(members: list[tuple[str, bytes]], message: str, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    (tmp_path / "a.tar").write_bytes(tar(members))
    said = refusal(tmp_path, webdataset="a.tar")
    assert said is not None
    assert said.startswith(f"webdataset {tmp_path}/a.tar")
    assert message in said


def test_patterns_that_would_run_a_program(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    said = refusal(tmp_path, webdataset="a.tar::pipe:touch evil")
    assert said is not None
    assert "joins patterns by '::'" in said
