"""A disk that fails or kills at a write of one's choice, and processes that share our memory."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Strike = Callable[[Path], None]
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch_writes(patch: pytest.MonkeyPatch, folder: Path, strike: Strike) -> None:
    """Call `strike(path)` before every write below `folder`: files opened for it, folders made, names changed."""

    def told(path: Any) -> None:
        if not isinstance(path, int) and Path(path).is_relative_to(folder):
            strike(Path(path))

    def wrap(owner: Any, name: str, writes: Callable[..., bool]) -> None:
        real = getattr(owner, name)

        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if writes(*args, **kwargs):
                told(path)
            return real(path, *args, **kwargs)

        patch.setattr(owner, name, call)

    def always(*_: Any, **__: Any) -> bool:
        return True

    wrap(os, "open", lambda flags=0, *_, **__: bool(flags & WRITING))
    wrap(io, "open", lambda mode="r", *_, **__: any(letter in mode for letter in "wax+"))
    wrap(os, "mkdir", always)
    for name in ("rename", "replace"):
        wrap(os, name, always)
    real = __import__("datafree.cache.store", fromlist=["save_file"]).save_file

    def save(tensors: Any, path: Any, **kwargs: Any) -> None:  # written outside Python
        told(path)
        real(tensors, path, **kwargs)

    patch.setattr("datafree.cache.store.save_file", save)


def forked(action: Callable[[], int]) -> int:
    """Run `action` in a process of its own, which has everything imported; returns its id. See `ended`."""
    process = os.fork()
    if process:
        return process
    code = 70  # what raises ends the child too: it must not go on as a second test run
    try:
        code = action()
    finally:
        os._exit(code)


def ended(process: int) -> int:
    """Wait for a process; its exit code, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
