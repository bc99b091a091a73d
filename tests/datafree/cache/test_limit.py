"""The cache's size limit: oldest first, and nothing that a running process uses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from datafree.cache import limit as cache_limit
from datafree.cache.limit import LIMIT_VARIABLE, limit_bytes, trim
from datafree.cache.store import Store, stage_key
from datafree.errors import UsageError
from datafree.proxy.shards import ShardFolder
from datafree.proxy.source import SHARD, Shard


@pytest.fixture(autouse=True)
def _own_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_limit, "_leases", {})


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`limit(bytes)` from here on."""
    return lambda size: monkeypatch.setenv(LIMIT_VARIABLE, repr(size / 1e9))


def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process has used so far is forgotten, as if another one had used it and ended."""
    for lease in cache_limit._leases.values():
        assert lease.lock is not None
        lease.lock.release()
    monkeypatch.setattr(cache_limit, "_leases", {})


def shards(root: Path, kind: str, count: int = 1) -> tuple[list[Path], list[str]]:
    def make(index: int) -> Shard:
        return Shard(torch.full((SHARD, 1, 8, 8), index, dtype=torch.uint8))

    files, notes = ShardFolder(root, kind, {"kind": kind}).fill(count * SHARD, make, lambda done: None)
    return [file.path for file in files], notes


def age(path: Path, seconds: int) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_the_shard_that_was_unused_for_longest_goes_first(
    tmp_path: Path, limit: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (old, older), _ = shards(tmp_path, "noise", 2)
    age(old, 100)
    age(older, 200)
    another_process(monkeypatch)
    limit(2.5 * old.stat().st_size)
    (new,), _ = shards(tmp_path, "procedural")
    assert (old.exists(), older.exists(), new.exists()) == (True, False, True)
    another_process(monkeypatch)
    limit(1e9)
    again, notes = shards(tmp_path, "noise", 2)
    assert again == [old, older]
    assert notes == [], "it was let go, not lost"


def test_reading_makes_a_shard_fresh(
    tmp_path: Path, limit: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (read,), (other,) = shards(tmp_path, "noise")[0], shards(tmp_path, "procedural")[0]
    age(read, 200)
    age(other, 100)
    another_process(monkeypatch)
    shards(tmp_path, "noise")
    another_process(monkeypatch)
    limit(1.5 * read.stat().st_size)
    trim(tmp_path)
    assert (read.exists(), other.exists()) == (True, False)


def test_the_running_job_keeps_what_it_uses(tmp_path: Path, limit: Callable[[float], None]) -> None:
    limit(0)
    (first, second), _ = shards(tmp_path, "noise", 2)
    (third,), _ = shards(tmp_path, "procedural")
    assert first.exists() and second.exists() and third.exists()  # noqa: PT018 - one statement


def test_another_running_process_keeps_what_it_uses(tmp_path: Path, limit: Callable[[float], None]) -> None:
    code = (
        "import sys; from pathlib import Path; from datafree.cache.limit import used\n"
        "used(Path(sys.argv[1]), Path(sys.argv[2])); print('ready', flush=True); sys.stdin.read()"
    )
    (path,), _ = shards(tmp_path, "noise")
    cache_limit._leases.clear()
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    limit(0)
    assert trim(tmp_path) == []
    child.communicate("")
    assert trim(tmp_path) == [path]


def test_statistics_count_too(
    tmp_path: Path, limit: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, keys = Store(tmp_path), [stage_key("statistics", {"run": number}) for number in range(2)]
    store.write("statistics", keys[0], {"x": torch.zeros(1000)})
    age(store.path("statistics", keys[0]), 100)
    another_process(monkeypatch)
    limit(6000)
    store.write("statistics", keys[1], {"x": torch.zeros(1000)})
    assert store.read("statistics", keys[0]) is None
    assert store.read("statistics", keys[1]) is not None


def test_nothing_else_is_touched(tmp_path: Path, limit: Callable[[float], None]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"0" * 1000)
    limit(0)
    assert trim(tmp_path) == []


def test_a_limit_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIMIT_VARIABLE, raising=False)
    assert limit_bytes() == 50_000_000_000
    for text in ("much", "-1", "nan"):
        monkeypatch.setenv(LIMIT_VARIABLE, text)
        with pytest.raises(UsageError) as caught:
            limit_bytes()
        assert str(caught.value) == (
            f"DATAFREE_CACHE_GB is {text!r}: give the cache's limit as a number of gigabytes, for example 20"
        )
