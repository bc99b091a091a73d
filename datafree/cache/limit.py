"""How large the cache may grow: files that were not used for longest go first, never one that a running job uses.

    CACHE/running/PID.lock    held by a process for as long as it runs
    CACHE/running/PID.txt     the cached files it has read or written, one a line, relative to CACHE

Only what can be made again is dropped: proxy shards and finished stages. When a file was last used is its time of
access, which is set here, because many file systems do not keep it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from datafree.cache.manifest import MANIFEST, manifest_text, read_manifest
from datafree.errors import RunError, UsageError
from datafree.folders import publish, temporary

LIMIT_VARIABLE = "DATAFREE_CACHE_GB"
LIMIT_GB = 50.0
RUNNING = "running"
_STAGE = re.compile(r"[0-9a-f]{64}\.safetensors")


def limit_bytes() -> int:
    """The limit, from `$DATAFREE_CACHE_GB` (10^9 bytes, 50 where it is not set). Raises UsageError for another text."""
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        gigabytes = float(text) if text else LIMIT_GB
    except ValueError:
        gigabytes = -1.0
    if not gigabytes >= 0:
        raise UsageError(
            f"{LIMIT_VARIABLE} is {text!r}: give the cache's limit as a number of gigabytes, for example 20"
        )
    return int(min(gigabytes, 1e9) * 1e9)


@dataclass
class _Lease:
    """What this process has used under one root; others see it for as long as the process lives."""

    root: Path
    files: set[str] = field(default_factory=set)
    lock: FileLock | None = None
    pid: int = 0

    def add(self, name: str) -> None:
        if self.pid != os.getpid():  # the first time, or a forked child: a lease of its own
            folder = self.root / RUNNING
            folder.mkdir(parents=True, exist_ok=True)
            self.pid, self.files = os.getpid(), set()
            self.lock = FileLock(folder / f"{self.pid}.lock")
            self.lock.acquire(timeout=5)
            (folder / f"{self.pid}.txt").write_text("", encoding="utf-8")
        if name not in self.files:
            self.files.add(name)
            with (self.root / RUNNING / f"{self.pid}.txt").open("a", encoding="utf-8") as file:
                file.write(name + "\n")


_leases: dict[Path, _Lease] = {}


def used(root: Path, path: Path) -> None:
    """Say that this process uses the cached file `path`: it counts as fresh, and stays until the process ends.

    In a cache that may only be read nothing is noted, and nothing is dropped from it either.
    """
    root = root.absolute()
    try:
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        _leases.setdefault(root, _Lease(root)).add(str(path.absolute().relative_to(root)))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return
        raise RunError(
            f"the cache {root} cannot be written ({error.strerror}): change its permissions, free some space, "
            "or name another cache folder"
        ) from error


def trim(root: Path) -> list[Path]:
    """Drop the files that were used least recently until what can be dropped fits the limit; returns them."""
    root = root.absolute()
    sizes = {}
    for path in _droppable(root):
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            facts = path.stat()
            sizes[path] = (facts.st_atime_ns, facts.st_size)
    total, limit = sum(size for _, size in sizes.values()), limit_bytes()
    if total <= limit:
        return []
    kept, dropped = _in_use(root), []
    for path, (_, size) in sorted(sizes.items(), key=lambda item: item[1]):
        if total <= limit:
            break
        if str(path.relative_to(root)) not in kept and _drop(path):
            total -= size
            dropped.append(path)
    return dropped


def _droppable(root: Path) -> list[Path]:
    stages = [path for path in root.glob("*/*.safetensors") if _STAGE.fullmatch(path.name)]
    return [*stages, *root.glob("proxy/*/*/shard-*.safetensors")]


def _in_use(root: Path) -> set[str]:
    """Files of every process that is alive; what dead ones left behind is cleared away."""
    names = set(_leases[root].files) if root in _leases else set()
    for listing in (root / RUNNING).glob("*.txt"):
        if listing.stem == str(os.getpid()):
            continue
        lock = FileLock(listing.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            names.update(listing.read_text(encoding="utf-8").splitlines())
            continue
        listing.unlink(missing_ok=True)
        lock.release()
    return names


def _drop(path: Path) -> bool:
    """Remove one file, unless it is being made just now."""
    if not path.name.startswith("shard-"):
        path.unlink(missing_ok=True)
        return True
    try:
        with FileLock(path.with_suffix(".lock"), timeout=0):
            _strike(path)
            path.unlink(missing_ok=True)
    except Timeout:
        return False
    return True


def _strike(shard: Path) -> None:
    """Take a shard off the manifest beside it: when it is asked for again it was let go, not lost."""
    manifest = shard.with_name(MANIFEST)
    with FileLock(manifest.with_suffix(".lock")):
        content = read_manifest(manifest)
        if (
            content is None
            or content["shards"].pop(str(int(shard.stem.removeprefix("shard-"))), None) is None
        ):
            return  # whoever reads that folder next finds what is wrong with it, and says so
        with temporary(manifest) as making:
            making.write_text(manifest_text(content), encoding="utf-8")
            publish(making)
            making.replace(manifest)
