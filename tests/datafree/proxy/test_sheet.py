from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datafree.errors import UsageError
from datafree.models.parent import Parent
from datafree.proxy import ProxySet, contact_sheet, export_folder

Build = Callable[..., ProxySet]
MakeParent = Callable[..., Parent]

MIXED = ({"kind": "noise", "share": 0.5}, {"kind": "procedural", "share": 0.5})


def test_a_contact_sheet_shows_the_images_in_order(build: Build, tmp_path: Path) -> None:
    proxies = build(20, *MIXED)
    contact_sheet(proxies, tmp_path / "sheet.png", count=6, columns=4)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * 18 * 4, 4 * 18 * 4, 3)  # 16 pixels and a gap of 2, four times as large
    fifth = sheet[::4, ::4][18:34, 0:16]
    assert np.array_equal(fifth, proxies.batch([4])[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("channels", [1, 3])
def test_exported_images_are_the_proxies(
    build: Build, parent: MakeParent, tmp_path: Path, channels: int
) -> None:
    pair = (parent("a", 1, channels=channels), parent("b", 2, channels=channels))
    proxies = build(10, *MIXED, parents=pair)
    export_folder(proxies, tmp_path / "out")
    files = sorted((tmp_path / "out").rglob("*.png"), key=lambda path: path.name)
    assert {path.parent.name for path in files} == {"1-noise", "2-procedural"}
    assert [path.stem for path in files] == [f"{number:06}" for number in range(10)]
    for number, path in enumerate(files):
        image = proxies.batch([number])[0]
        shown = image[0] if channels == 1 else image.permute(1, 2, 0)
        assert np.array_equal(np.asarray(Image.open(path)), shown.numpy())


def test_nothing_is_overwritten(build: Build, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    with pytest.raises(UsageError) as error:
        export_folder(build(3, {"kind": "noise"}), tmp_path / "out")
    assert str(error.value) == f"{tmp_path / 'out'} is not empty: choose another folder for the images"
