"""Merges on caches that fill up, are shared or damaged or read-only, and killed merges: the same bytes at last."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from datafree.cache.store import CACHE_VARIABLE
from datafree.cli import main
from tests.datafree.disk import ended, forked, watch_writes
from tests.datafree.tiny import Tiny, make_tiny

SMALL = ("merge.budgets=[1.4]", "evaluate=[{name: upright, images: {digits: {domain: upright}, limit: 40}}]")
LEFT = ("model.safetensors", "config.json", "metrics.json")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a merge on a cache of its own leaves."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = _merge(tiny, folder)
    assert result.exit_code == 0, result.output
    return _bytes(folder)


def _merge(tiny: Tiny, place: Path, command: str = "merge") -> Result:
    """A run with its cache and its output in `place`."""
    out = ["-o", str(place / "out")] if command == "merge" else []
    settings = [word for setting in SMALL for word in ("--set", setting)]
    runner = CliRunner(env={CACHE_VARIABLE: str(place / "cache")})
    return runner.invoke(main, [command, str(tiny.recipe), *out, *settings])


def _bytes(place: Path) -> dict[str, bytes]:
    """What a run left; of its metrics all but the notes, which tell of what was made again."""
    found = {name: (place / "out" / name).read_bytes() for name in LEFT}
    metrics = json.loads(found["metrics.json"])
    return {**found, "metrics.json": json.dumps({**metrics, "notes": []}).encode()}


def _error(result: Result) -> str:
    """The one message of a run that failed, below the lines of its progress."""
    assert result.exit_code in (1, 2), result.output
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    _, found, message = result.stderr.partition("error: ")
    assert found, result.stderr
    assert message.count("\n") == 1
    return message.strip()


def _temporary(place: Path) -> list[Path]:
    return [path for path in place.rglob(".*") if path.name not in (".", "..")]


@contextmanager
def _broken(place: Path, code: int, word: str = "") -> Iterator[list[Path]]:
    """Writes below `place` whose path holds `word` fail; gives the paths."""
    hit: list[Path] = []

    def fail(path: Path) -> None:
        if word in str(path.relative_to(place)):
            hit.append(path)
            raise OSError(code, os.strerror(code), str(path))

    with pytest.MonkeyPatch.context() as patch:
        watch_writes(patch, place, fail)
        yield hit


@pytest.mark.parametrize("inside", ["manifest", "statistics", "running"])
def test_a_disk_that_is_full_at_one_stage(inside: str, tiny: Tiny, tmp_path: Path) -> None:
    with _broken(tmp_path / "cache", errno.ENOSPC, inside) as hit:
        result = _merge(tiny, tmp_path)
    assert hit
    message = _error(result)
    assert "(No space left on device)" in message or "[Errno 28] No space left on device" in message
    assert "free" in message
    assert not (tmp_path / "out").exists()
    assert _temporary(tmp_path) == []


def test_full_disks_stage_by_stage_end_with_the_same_bytes(
    tiny: Tiny, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """Every stage's first write fails once, the output's last; each run goes on where the one before stopped."""
    failed: list[str] = []

    def fail(path: Path) -> None:
        stage = path.relative_to(tmp_path).parts[:2]
        name = "out" if stage and "out" in stage[0] else "/".join(stage)
        if name and name not in failed:
            failed.append(name)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with pytest.MonkeyPatch.context() as patch:
        watch_writes(patch, tmp_path, fail)
        for _ in range(12):
            result = _merge(tiny, tmp_path)
            if result.exit_code == 0:
                break
            assert "No space left on device" in _error(result)
            assert not (tmp_path / "out").exists()
    assert len(failed) >= 5
    assert _bytes(tmp_path) == undisturbed
    assert _temporary(tmp_path) == []


def test_a_cache_that_may_only_be_read(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before any work, by `check` as by `merge`; where permissions do not tell, at the first write."""
    with _broken(tmp_path / "cache", errno.EROFS):
        result = _merge(tiny, tmp_path)
    assert "Read-only file system" in _error(result)
    assert not (tmp_path / "out").exists()
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not str(path).startswith(str(tmp_path)) and real(path, mode)
    )
    place = tmp_path / "cache" if (tmp_path / "cache").exists() else tmp_path
    for command in ("check", "merge"):
        result = _merge(tiny, tmp_path, command)
        assert result.exit_code == 2
        assert _error(result) == (
            f"the cache folder {tmp_path / 'cache'} cannot be written ({place} is read-only, or not yours): change its "
            "permissions, or set DATAFREE_CACHE to another folder"
        )


def test_two_runs_share_a_cache(tiny: Tiny, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("one", "two")]
    for place in places:
        place.mkdir()
        (place / "cache").symlink_to(tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    processes = [forked(lambda place=place: _merge(tiny, place).exit_code) for place in places]
    assert [ended(process) for process in processes] == [0, 0]
    assert [_bytes(place) == undisturbed for place in places] == [True, True]
    assert _temporary(tmp_path) == []


@pytest.mark.parametrize("seed", range(4))
def test_a_merge_that_was_killed_goes_on_to_the_same_bytes(
    seed: int, tiny: Tiny, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """Killed before a write of the seed's choice, in the cache or in the output: nothing can be tidied up then."""
    number = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[seed]
    chosen = random.Random(seed).randrange(3, 40)

    def killed() -> int:
        writes = []

        def strike(path: Path) -> None:
            writes.append(path)
            if len(writes) == chosen:
                os.kill(os.getpid(), number)

        watch_writes(pytest.MonkeyPatch(), tmp_path, strike)
        return _merge(tiny, tmp_path).exit_code

    code = ended(forked(killed))
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    assert not (tmp_path / "out").exists()
    result = _merge(tiny, tmp_path)
    assert result.exit_code == 0, result.output
    assert _bytes(tmp_path) == undisturbed
    assert _temporary(tmp_path) == []


def _damage(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    kind = chance.choice(["flip", "cut", "empty", "zeros", "gone"])
    if kind == "flip":
        place = chance.randrange(len(content))
        path.write_bytes(
            content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]
        )
    elif kind == "gone":
        path.unlink()
    else:
        kept = {"cut": content[: chance.randrange(len(content))], "empty": b"", "zeros": bytes(len(content))}
        path.write_bytes(kept[kind])


def test_damage_to_everything_in_the_cache(tiny: Tiny, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """Every entry and every manifest spoiled, three times over: named, made again, the same bytes."""
    assert _merge(tiny, tmp_path).exit_code == 0
    for seed in range(3):
        chance = random.Random(seed)
        for path in sorted((tmp_path / "cache").rglob("*")):
            if path.suffix in (".safetensors", ".json"):
                _damage(path, chance)
        (tmp_path / "out").rename(tmp_path / f"out-{seed}")
        result = _merge(tiny, tmp_path)
        assert result.exit_code == 0, result.output
        assert _bytes(tmp_path) == undisturbed
        said = (tmp_path / "out" / "metrics.json").read_text()
        assert "it is computed again" in said or "rebuilt" in said


def test_inputs_that_change_between_check_and_merge(tmp_path: Path) -> None:
    """The merge is of what is there when it runs, whatever was cached before; what is gone is named."""
    tiny, place, fresh = make_tiny(tmp_path / "tiny"), tmp_path / "used", tmp_path / "fresh"
    place.mkdir()
    fresh.mkdir()
    assert _merge(tiny, place).exit_code == 0
    (place / "out").rename(place / "before")
    assert _merge(tiny, place, "check").exit_code == 0
    tiny.write_parent("b", 3)
    assert _merge(tiny, place).exit_code == 0
    assert _merge(tiny, fresh).exit_code == 0
    assert _bytes(place) == _bytes(fresh)
    assert _bytes(place)["model.safetensors"] != (place / "before" / "model.safetensors").read_bytes()
    (place / "out").rename(place / "after")
    (tiny.folder / "b.safetensors").unlink()
    message = _error(_merge(tiny, place))
    assert message.startswith(f"{tiny.recipe}:4:")
    assert "b.safetensors" in message
    assert not (place / "out").exists()
