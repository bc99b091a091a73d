"""Finished stages on disk, found again by what they mean.

A stage's key is the hash of everything that decides its numbers: the part of the resolved recipe it reads,
the fingerprints of its inputs, our own code and this file's schema version. A stage is written to a
temporary name and moved into place, so a file under its final name is always whole; its content is hashed
again on reading, so damage never goes unnoticed.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from datafree.cache.limit import RUNNING, trim, used
from datafree.errors import DatafreeError, RunError, UsageError
from datafree.folders import publish, sweep, temporary

SCHEMA = 1
CACHE_VARIABLE = "DATAFREE_CACHE"


class DamagedStage(DatafreeError):
    """A stage on disk is not what was written; the caller says so and computes it again."""


@dataclass(frozen=True)
class Stage:
    """What one stage left: tensors by name, and a JSON value."""

    tensors: Mapping[str, Tensor]
    value: Any


def cache_folder() -> Path:
    """Where caches live: `$DATAFREE_CACHE`, else `$XDG_CACHE_HOME/datafree`, else `~/.cache/datafree`."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "datafree"


def check_writable(root: Path) -> None:
    """Raises UsageError where the cache could not be written; makes nothing."""
    place = next(path for path in (root, *root.parents) if path.exists())
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return
    why = "is read-only, or not yours" if place.is_dir() else "is not a folder"
    raise UsageError(
        f"the cache folder {root} cannot be written ({place} {why}): change its permissions, or set "
        f"{CACHE_VARIABLE} to another folder"
    )


def stage_key(stage: str, inputs: Mapping[str, Any]) -> str:
    """The name under which a stage with these JSON-able inputs is kept: 64 hexadecimal digits."""
    meaning = {"schema": SCHEMA, "code": code_fingerprint(), "stage": stage, "inputs": inputs}
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


@cache
def code_fingerprint() -> str:
    """SHA-256 of what our source files do, whatever their comments: a stage computed by other code is another one."""
    digest = hashlib.sha256()
    for package in ("datafree", "pleas"):
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            meaning = syntax_without_words(path.read_text(encoding="utf-8"))
            digest.update(f"{package}/{path.relative_to(root)}\x00{meaning}\x00".encode())
    return digest.hexdigest()


def syntax_without_words(source: str) -> str:
    """The syntax tree of Python source as text, without comments, layout and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:]
    return ast.dump(tree)


@dataclass(frozen=True)
class Store:
    """Stages under the folder `root`, one file each."""

    root: Path

    def path(self, stage: str, key: str) -> Path:
        return self.root / stage / f"{key}.safetensors"

    def read(self, stage: str, key: str) -> Stage | None:
        """The stage kept under `key`, or None if there is none. Raises DamagedStage, naming the file."""
        path = self.path(stage, key)
        if not path.exists():
            return None
        try:
            header, tensors = read_safetensors(path)
        except (SafetensorError, OSError) as error:
            raise DamagedStage(f"{path} cannot be read ({error})") from error
        if header.get("key") != key:
            raise DamagedStage(f"{path} holds another stage ({header.get('key', 'no key')})")
        value = header.get("value", "null")
        if header.get("sha256") != content_hash(tensors, value):
            raise DamagedStage(f"{path} does not have the content it was written with")
        try:
            known = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DamagedStage(f"{path} holds a value that is not JSON ({error})") from error
        used(self.root, path)
        return Stage(tensors, known)

    def write(self, stage: str, key: str, tensors: Mapping[str, Tensor], value: Any = None) -> None:
        """Keep a finished stage. Raises RunError when the cache cannot be written."""
        path = self.path(stage, key)
        text = json.dumps(value)
        whole = plain_tensors(tensors)
        header = {"key": key, "value": text, "sha256": content_hash(whole, text)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path.parent)
            with temporary(
                path, is_folder=True
            ) as making:  # safetensors puts a file of its own in a file's place
                write_safetensors(making / path.name, whole, header)
                (making / path.name).replace(path)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"the cache {self.root} cannot be written ({error}): free some space, or set "
                f"{CACHE_VARIABLE} to another folder"
            ) from error
        used(self.root, path)
        trim(self.root)

    def size(self) -> int:
        """Bytes under the root, other caches there included; not the notes of who is using what."""
        notes = self.root / RUNNING
        files = (item for item in self.root.rglob("*") if item.is_file() and item.parent != notes)
        return sum(item.stat().st_size for item in files)


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: on the CPU, contiguous, and no two in one piece of memory."""
    plain: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        if (
            own.untyped_storage().data_ptr() in taken
            or own.numel() * own.element_size() < own.untyped_storage().nbytes()
        ):
            own = own.clone()
        taken.add(own.untyped_storage().data_ptr())
        plain[name] = own
    return plain


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file.

    Raises SafetensorError or OSError, and nothing else, for a file that is damaged or is none.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path.name} is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except (AttributeError, KeyError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise SafetensorError(f"a header that torch cannot follow: {error}") from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file whose bytes depend on its content alone.

    The library writes the metadata's keys in random order; the header is written again, sorted, in its place. Its
    file is private; ours has the permissions of any new file.
    """
    save_file(dict(tensors), path, metadata=dict(metadata))
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(written) <= size, "the same header in another order is as long"
        file.seek(8)
        file.write(written.ljust(size))
    publish(path)


def content_hash(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 of names, types, shapes and bytes of `tensors`, in the order of their names, and of `text`."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\x00{name}\x00{tensor.dtype}\x00{tuple(tensor.shape)}\x00".encode())
        # Bytes, because numpy has no bfloat16.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
