"""Shards on disk: content-addressed, written atomically, verified on every read.

    CACHE/proxy/KIND/KEY/manifest.json             key; per shard sha256, images, seconds, facts
    CACHE/proxy/KIND/KEY/shard-00000.safetensors   `images`: uint8 (n, channels, height, width)

KEY is the hash of everything the pixels depend on. A shard counts as present when the manifest lists it and
the file has the listed sha256; anything else is made again, and said. Several processes may fill one
folder: each shard is made under its own lock, and a process that finds a shard taken goes on to the next
missing one. Above the cache's size limit (`cache_limit`), shards that were not used for longest are dropped.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from datafree.cache.limit import trim, used
from datafree.cache.manifest import MANIFEST, manifest_text, read_manifest
from datafree.errors import RunError, UsageError
from datafree.folders import publish, sweep, temporary
from datafree.proxy.source import SHARD, Shard

SCHEMA = 1  # layout of the cache folder; raised when older folders can no longer be read


def canonical(value: object) -> str:
    """JSON with sorted keys and no spaces: one text, hence one hash, for one meaning."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: object) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()


@dataclass(frozen=True)
class ShardFile:
    """One verified shard: where it lies, the sha256 of the file, and what the manifest says of it."""

    path: Path
    sha256: str
    images: int
    seconds: float
    facts: Mapping[str, Any]

    def read(self) -> Tensor:
        """uint8 (n, channels, height, width). Raises RunError when the file changed since it was listed."""
        images = _read(self.path, self.sha256)
        if isinstance(images, str):
            raise RunError(
                f"the proxy shard {self.path} {images} while it was in use: run again, it will be rebuilt"
            )
        return images


class ShardFolder:
    """The shards of one source under one key."""

    def __init__(self, root: Path, kind: str, key: Mapping[str, Any]) -> None:
        self.key = digest(key)
        self._root = root
        self.path = root / "proxy" / kind / self.key[:24]
        self._described = dict(key)

    def found(self, count: int) -> list[ShardFile] | None:
        """The shards that hold the first `count` images where all are there and whole; nothing is written."""
        ready = [self._verified(index, []) for index in range(-(-count // SHARD))]
        return None if None in ready else [file for file in ready if file is not None]

    def _check_writable(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            sweep(self.path)
            with temporary(self.path / "probe"):
                pass
        except OSError as error:
            raise UsageError(
                f"the cache folder {self.path} cannot be written ({error.strerror}): free space, "
                "change its permissions, or name another cache folder"
            ) from error

    def fill(
        self,
        count: int,
        make: Callable[[int], Shard],
        progress: Callable[[int], None],
    ) -> tuple[list[ShardFile], list[str]]:
        """The shards that hold the first `count` images, the missing ones made now; a note per one replaced.

        progress: called after each with the number of shards that are ready
        Raises UsageError where the folder cannot be written, RunError when the disk is full.
        """
        self._check_writable()
        wanted = range(-(-count // SHARD))
        ready: dict[int, ShardFile] = {}
        notes: list[str] = []
        for patient in (False, True):  # first what nobody else is making, then wait for the others
            for index in wanted:
                if index in ready:
                    continue
                try:
                    with FileLock(self._name(index).with_suffix(".lock"), timeout=-1 if patient else 0):
                        ready[index] = self._verified(index, notes) or self._make(index, make)
                        used(self._root, ready[index].path)
                except Timeout:
                    continue
                progress(len(ready))
        trim(self._root)
        return [ready[index] for index in wanted], notes

    def _name(self, index: int) -> Path:
        return self.path / f"shard-{index:05d}.safetensors"

    def _listed(self) -> dict[str, Any]:
        """What the manifest says of every shard; nothing where it is damaged, or of other images."""
        content = read_manifest(self.path / MANIFEST)
        same = content is not None and content.get("key") == json.loads(canonical(self._described))
        return content["shards"] if content is not None and same else {}

    def _verified(self, index: int, notes: list[str]) -> ShardFile | None:
        path = self._name(index)
        entry = self._listed().get(str(index))
        if entry is None:
            if path.exists():
                notes.append(f"rebuilt {path}: the manifest beside it does not list it")
            return None
        images = _read(path, entry["sha256"])
        if isinstance(images, str):
            notes.append(f"rebuilt {path}: it {images}")
            return None
        return ShardFile(path, entry["sha256"], entry["images"], entry["seconds"], entry["facts"])

    def _make(self, index: int, make: Callable[[int], Shard]) -> ShardFile:
        started = time.perf_counter()
        shard = make(index)
        seconds = time.perf_counter() - started
        data = save({"images": shard.images.contiguous()})
        entry = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "images": len(shard.images),
            "seconds": round(seconds, 3),
            "facts": json.loads(canonical(dict(shard.facts))),  # the same value now as when read again
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        _write(self._name(index), data)
        with FileLock(self.path / "manifest.lock"):
            shards = {**self._listed(), str(index): entry}
            text = manifest_text({"schema": SCHEMA, "key": self._described, "shards": shards})
            _write(self.path / MANIFEST, text.encode())
        return ShardFile(
            self._name(index), entry["sha256"], entry["images"], entry["seconds"], entry["facts"]
        )


def fingerprint(shards: Sequence[ShardFile]) -> str:
    return digest([shard.sha256 for shard in shards])


def _read(path: Path, sha256: str) -> Tensor | str:
    """The shard's images, or what is wrong with the file, as the end of a sentence."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if hashlib.sha256(data).hexdigest() != sha256:
        return "does not have the sha256 its manifest lists"
    try:
        return load(data)["images"]
    except (SafetensorError, KeyError):
        return "is not a shard of images"


def _write(path: Path, data: bytes) -> None:
    """Atomic: readers see the old file or the whole new one."""
    try:
        with temporary(path) as making:
            making.write_bytes(data)
            publish(making)
            making.replace(path)
    except OSError as error:
        raise RunError(
            f"the cache file {path} could not be written ({error.strerror}): free space or name another "
            "cache folder, and run again; finished shards are kept"
        ) from error
