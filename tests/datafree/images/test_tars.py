"""webdataset tars: the pixels and labels that stand in them, and what is said of those that are wrong."""

from __future__ import annotations

import io
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datafree.errors import UsageError
from datafree.images import tars
from datafree.images.image_set import ImageSet, ImageSpec, load_images


def load(base: Path, **keys: Any) -> ImageSet:
    return load_images(ImageSpec.model_validate(keys), base)


def refusal(base: Path, **keys: Any) -> str:
    with pytest.raises(UsageError) as caught:
        load(base, **keys)
    return str(caught.value)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def two_tars(folder: Path, count: int = 6) -> list[np.ndarray]:
    """Half of the images in each, labelled 0, 1, 2 in turn."""
    pictures = [noise(number, 6, 5, 3) for number in range(count)]
    for part in range(2):
        members = {}
        for number in range(part * count // 2, (part + 1) * count // 2):
            members[f"{number:04}.png"] = encoded(pictures[number])
            members[f"{number:04}.cls"] = str(number % 3).encode()
            members[f"{number:04}.json"] = b"{}"
        write_tar(folder / f"part-{part}.tar", members)
    return pictures


def test_images_and_labels_of_several_tars(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    pictures = two_tars(tmp_path)
    images = load(tmp_path, webdataset="part-{0..1}.tar")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert isinstance(images.images, np.ndarray)
    assert np.array_equal(images.images, np.stack(pictures).transpose(0, 3, 1, 2))


def test_only_what_is_chosen_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("webdataset")
    pictures = two_tars(tmp_path)
    decoded = []
    real = tars.pixels
    monkeypatch.setattr(tars, "pixels", lambda *given: decoded.append(1) or real(*given))
    images = load(tmp_path, webdataset="part-{0..1}.tar", keep_labels=(2,), limit=1)
    assert len(images) == len(decoded) == 1
    assert any(np.array_equal(images.images[0], pictures[k].transpose(2, 0, 1)) for k in (2, 5))


def test_exif_grey_and_unequal_sizes(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    write_tar(
        tmp_path / "a.tar", {"1.png": encoded(noise(0, 4, 8), exif=exif), "2.png": encoded(noise(1, 8, 4))}
    )
    assert load(tmp_path, webdataset="a.tar").shape == (1, 8, 4)
    write_tar(tmp_path / "b.tar", {"1.png": encoded(noise(0, 4, 8)), "2.png": encoded(noise(1, 8, 4))})
    assert "have 2 sizes (4 x 8, 8 x 4)" in refusal(tmp_path, webdataset="b.tar")
    assert load(tmp_path, webdataset="b.tar", size=4).shape == (1, 4, 4)


def test_broken_images_are_named_skipped_and_counted(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    members = {f"{number:02}.png": encoded(noise(number, 4, 4)) for number in range(18)}
    whole = encoded(noise(18, 40, 40))
    members |= {"18.png": whole[: len(whole) // 2], "19.png": b"a page, not a picture"}
    write_tar(tmp_path / "a.tar", members)
    images = load(tmp_path, webdataset="a.tar", size=4)
    assert len(images) == 18
    (note,) = images.notes
    assert note.startswith(
        f"2 of 20 image files in {tmp_path} cannot be read and were skipped: a.tar/19.png: not an image"
    )
    assert "a.tar/18.png: " in note
    del members["00.png"], members["01.png"]
    write_tar(tmp_path / "b.tar", members)
    assert "cannot be read, more than 10%" in refusal(tmp_path, webdataset="b.tar", size=4)


def test_wrong_tars_say_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("webdataset")
    two_tars(tmp_path)
    assert refusal(tmp_path, webdataset="part-{0..3}.tar") == (
        f"webdataset {tmp_path}/part-{{0..3}}.tar: 2 of 4 tars are not there, the first is {tmp_path}/part-2.tar"
    )
    (tmp_path / "torn.tar").write_bytes(b"no tar at all" * 100)
    assert f"webdataset {tmp_path}/torn.tar cannot be read as a tar" in refusal(
        tmp_path, webdataset="torn.tar"
    )
    write_tar(tmp_path / "text.tar", {"1.txt": b"hello"})
    assert re.match(
        r"webdataset .*text\.tar: there is no image \(\.jpg, ", refusal(tmp_path, webdataset="text.tar")
    )
    write_tar(tmp_path / "cls.tar", {"1.png": encoded(noise(0, 4, 4)), "1.cls": b"cat"})
    assert refusal(tmp_path, webdataset="cls.tar") == (
        f"webdataset {tmp_path}/cls.tar/1.png: its .cls file holds 'cat', not a class number from 0 to 1,000,000"
    )
    monkeypatch.setattr(tars, "MOST", 5)
    assert "has 6 images, which would be read into memory: say how many are wanted" in refusal(
        tmp_path, webdataset="part-{0..1}.tar"
    )


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    assert refusal(tmp_path, webdataset="a.tar") == (
        "webdataset tars are read with the webdataset library, which is not installed: "
        "pip install 'datafree[webdataset]'"
    )
