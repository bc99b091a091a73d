from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from datafree.errors import RunError, UsageError
from datafree.proxy.shards import ShardFolder
from datafree.proxy.source import SHARD, Shard


def shard_of(index: int) -> Shard:
    return Shard(torch.full((SHARD, 3, 4, 4), index, dtype=torch.uint8), {"loss": index / 2})


class Counting:
    """`shard_of`, remembering which shards were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, index: int) -> Shard:
        self.asked.append(index)
        return shard_of(index)


def quiet(done: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture
def folder(tmp_path: Path) -> ShardFolder:
    return ShardFolder(tmp_path, "noise", {"seed": 0})


def test_shards_are_made_once_and_read_back(folder: ShardFolder) -> None:
    make, heard = Counting(), []
    files, notes = folder.fill(3 * SHARD - 1, make, heard.append)
    assert (make.asked, heard, notes) == ([0, 1, 2], [1, 2, 3], [])
    again, _ = folder.fill(3 * SHARD, make, quiet)
    assert make.asked == [0, 1, 2]
    assert again == files
    assert torch.equal(again[1].read(), shard_of(1).images)
    assert again[1].facts == {"loss": 0.5}


def test_another_key_is_another_folder(folder: ShardFolder, tmp_path: Path) -> None:
    assert ShardFolder(tmp_path, "noise", {"seed": 1}).path != folder.path


def test_a_run_that_was_cut_off_goes_on_with_the_missing_shards(folder: ShardFolder) -> None:
    def stops_at_two(index: int) -> Shard:
        if index == 2:
            raise KeyboardInterrupt
        return shard_of(index)

    with pytest.raises(KeyboardInterrupt):
        folder.fill(4 * SHARD, stops_at_two, quiet)
    make = Counting()
    files, notes = folder.fill(4 * SHARD, make, quiet)
    assert make.asked == [2, 3]
    assert [int(file.read()[0, 0, 0, 0]) for file in files] == [0, 1, 2, 3]
    assert notes == []


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "swap"])
def test_a_damaged_shard_is_named_and_made_again(folder: ShardFolder, damage: str) -> None:
    files, _ = folder.fill(2 * SHARD, shard_of, quiet)
    path = files[1].path
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    elif damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "empty":
        data = bytearray()
    else:  # a sound shard, but another one
        data = bytearray(files[0].path.read_bytes())
    path.write_bytes(data)
    make = Counting()
    mended, notes = folder.fill(2 * SHARD, make, quiet)
    assert make.asked == [1]
    assert [replace(file, seconds=0.0) for file in mended] == [replace(file, seconds=0.0) for file in files]
    assert notes == [f"rebuilt {path}: it does not have the sha256 its manifest lists"]


def test_a_missing_shard_is_made_again(folder: ShardFolder) -> None:
    files, _ = folder.fill(SHARD, shard_of, quiet)
    files[0].path.unlink()
    _, notes = folder.fill(SHARD, shard_of, quiet)
    assert notes == [f"rebuilt {files[0].path}: it is missing"]


@pytest.mark.parametrize("text", ["", "{", json.dumps({"key": {"seed": 9}, "shards": {}}), "[]"])
def test_shards_under_a_broken_or_foreign_manifest_are_made_again(folder: ShardFolder, text: str) -> None:
    folder.fill(SHARD, shard_of, quiet)
    (folder.path / "manifest.json").write_text(text)
    make = Counting()
    files, notes = folder.fill(SHARD, make, quiet)
    assert make.asked == [0]
    assert notes == [f"rebuilt {files[0].path}: the manifest beside it does not list it"]


def test_a_shard_that_changes_while_it_is_in_use(folder: ShardFolder) -> None:
    files, _ = folder.fill(SHARD, shard_of, quiet)
    files[0].path.write_bytes(b"")
    with pytest.raises(RunError) as error:
        files[0].read()
    assert str(error.value) == (
        f"the proxy shard {files[0].path} does not have the sha256 its manifest lists while it was in use: "
        "run again, it will be rebuilt"
    )


def test_two_runs_share_the_work(folder: ShardFolder) -> None:
    """The second run takes the shards the first has not begun, and waits for the one it is making."""
    begun, go_on = threading.Event(), threading.Event()
    first_made, second = [], Counting()

    def slow(index: int) -> Shard:
        first_made.append(index)
        begun.set()
        assert go_on.wait(10)
        return shard_of(index)

    first = threading.Thread(target=folder.fill, args=(2 * SHARD, slow, quiet))
    first.start()
    assert begun.wait(10)

    def heard(done: int) -> None:
        go_on.set()

    files, _ = folder.fill(2 * SHARD, second, heard)
    first.join(10)
    assert (first_made, second.asked) == ([0], [1])
    assert [int(file.read()[0, 0, 0, 0]) for file in files] == [0, 1]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "proxy").write_text("a file where the folder should be")
    with pytest.raises(
        UsageError, match=r"the cache folder .*proxy/noise/\w+ cannot be written \(.*\): free"
    ):
        ShardFolder(tmp_path, "noise", {}).fill(SHARD, shard_of, quiet)


def test_a_full_disk(folder: ShardFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.fill(SHARD, shard_of, quiet)

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunError) as error:
        folder.fill(2 * SHARD, shard_of, quiet)
    monkeypatch.undo()
    assert str(error.value) == (
        f"the cache file {folder.path / 'shard-00001.safetensors'} could not be written "
        "(No space left on device): free space or name another cache folder, and run again; finished shards "
        "are kept"
    )
    make = Counting()
    folder.fill(SHARD, make, quiet)
    assert make.asked == []
