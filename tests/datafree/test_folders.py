"""Output folders: whole or absent, never somebody else's, never replaced unasked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from datafree.errors import RunError, UsageError
from datafree.folders import check_output, new_folder


def _artefact(folder: Path, content: str = "old") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"datafree": "0"}))
    (folder / "content").write_text(content)
    return folder


def _refused(folder: Path, *, overwrite: bool = False) -> str:
    with pytest.raises(UsageError) as caught:
        check_output(folder, overwrite=overwrite)
    return str(caught.value)


def test_a_new_folder_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out, overwrite=False) as building:
        (building / "content").write_text("new")
        assert not out.exists()
    assert (out / "content").read_text() == "new"
    assert [path.name for path in out.parent.iterdir()] == ["out"], "nothing temporary left"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out", overwrite=False) as building:
        (building / "content").write_text("new")
    assert (tmp_path / "out" / "content").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_and_keeps_the_old(tmp_path: Path, error: type[BaseException]) -> None:
    out = _artefact(tmp_path / "out")

    def write() -> None:
        with new_folder(out, overwrite=True) as building:
            (building / "content").write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert (out / "content").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_all_of_it(tmp_path: Path) -> None:
    out = _artefact(tmp_path / "out")
    with new_folder(out, overwrite=True) as building:
        (building / "other").write_text("new")
    assert [path.name for path in out.iterdir()] == ["other"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_existing_artefact_is_not_replaced_unasked(tmp_path: Path) -> None:
    out = _artefact(tmp_path / "out")
    assert _refused(out) == f"{out} exists: choose another output folder, or replace it with --overwrite"


@pytest.mark.parametrize("content", [None, "not json", "[1]", '{"architecture": "resnet18"}'])
def test_a_folder_of_somebody_else_is_never_replaced(tmp_path: Path, content: str | None) -> None:
    out = tmp_path / "home"
    out.mkdir()
    (out / ("thesis.tex" if content is None else "config.json")).write_text(content or "text")
    expected = (
        f"{out} holds files that datafree did not write, and is left alone: choose another output folder"
    )
    assert _refused(out, overwrite=True) == expected


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    expected = f"{tmp_path / 'out'} exists and is not a folder: choose another output folder"
    assert _refused(tmp_path / "out", overwrite=True) == expected


def test_an_unwritable_place_is_found_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("datafree.folders.tempfile.mkdtemp", refuse)
    expected = (
        f"{tmp_path / 'out'} cannot be written (Permission denied): choose another output folder, or change "
        f"the permissions of {tmp_path}"
    )
    assert _refused(tmp_path / "out") == expected


def test_a_disk_that_fills_up_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught, new_folder(tmp_path / "out", overwrite=False):
        raise OSError(28, "No space left on device")
    assert "could not be written ([Errno 28] No space left on device)" in str(caught.value)
    assert "nothing was left behind" in str(caught.value)
    assert not any(tmp_path.iterdir())
