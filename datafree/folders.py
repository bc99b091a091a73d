"""Files and folders that are whole or not there: made under a temporary name beside their place, renamed at the end.

A temporary one is locked by the process that makes it. What a killed process left behind is locked by nobody, and the
next one that works there sweeps it away.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datafree.errors import RunError, UsageError

try:
    import fcntl
except ImportError:  # Windows: leftovers of killed processes stay until somebody removes them
    fcntl = None

PART = ".part"  # how the name of something temporary ends

MARK = "datafree"  # a key in config.json or metrics.json of our folders; others are never replaced


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Everything that would stop `new_folder`, found before heavy work. Raises UsageError."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"{folder} exists and is not a folder: choose another output folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not _is_ours(folder):
            raise UsageError(
                f"{folder} holds files that datafree did not write, and is left alone: choose another "
                "output folder"
            )
        if not overwrite:
            raise UsageError(f"{folder} exists: choose another output folder, or replace it with --overwrite")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary(folder, is_folder=True):
            pass
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written ({error.strerror}): choose another output folder, or change the "
            f"permissions of {folder.parent}"
        ) from error


def _is_ours(folder: Path) -> bool:
    for name in ("config.json", "metrics.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and MARK in content:
            return True
    return False


@contextmanager
def new_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder to fill; it takes the place of `folder` when the block ends well, and vanishes otherwise.

    Raises UsageError as `check_output` does, RunError when the disk fails while the block writes.
    """
    check_output(folder, overwrite=overwrite)
    try:
        sweep(folder.parent, f"{folder.name}.new")
        with temporary(folder, "new", is_folder=True) as building:
            publish(building)  # it was made private
            yield building
            _put_in_place(building, folder)
        sweep(folder.parent, f"{folder.name}.old")  # a killed process's, which was the only one until now
    except OSError as error:
        raise RunError(
            f"{folder} could not be written ({error}): nothing was left behind; free space and repeat"
        ) from error


@contextmanager
def temporary(place: Path, kind: str = "new", *, is_folder: bool = False) -> Iterator[Path]:
    """An empty private file or folder beside `place`, locked by this process; what is still there at the end goes."""
    prefix = f".{place.name}.{kind}."
    while True:
        if is_folder:
            path = Path(tempfile.mkdtemp(PART, prefix, place.parent))
            held = os.open(path, os.O_RDONLY) if fcntl is not None else None
        else:
            held, name = tempfile.mkstemp(PART, prefix, place.parent)
            path = Path(name)
            if fcntl is None:
                os.close(held)
                held = None
        if held is None or _lock(held, path, otherwise=True):
            break
        os.close(held)  # swept away by another process between the two calls
    try:
        yield path
    finally:
        if held is not None:
            os.close(held)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sweep(folder: Path, name: str = "") -> None:
    """Remove what killed processes left in `folder` under temporary names that begin with `.name`."""
    if fcntl is None:
        return
    for path in list(folder.iterdir()):
        if not (path.name.startswith(f".{name}") and path.name.endswith(PART)):
            continue
        try:
            held = os.open(path, os.O_RDONLY)
        except OSError:  # gone by now, or not ours
            continue
        try:
            if _lock(held, path, otherwise=False):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        finally:
            os.close(held)


def _lock(held: int, path: Path, *, otherwise: bool) -> bool:
    """Lock what is open as `held`; False where another process has it, or it is no longer what lies at `path`.

    otherwise: the answer on a file system that knows no locks
    """
    assert fcntl is not None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return otherwise
    try:
        return os.path.samestat(os.fstat(held), path.stat())
    except FileNotFoundError:
        return False


def publish(path: Path) -> None:
    """Give a file or folder that was made private the permissions that an ordinary new one has."""
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _put_in_place(building: Path, folder: Path) -> None:
    if not folder.exists():
        building.rename(folder)
        return
    with temporary(folder, "old", is_folder=True) as aside:
        folder.replace(aside / "old")
        try:
            building.rename(folder)
        except OSError:
            (aside / "old").rename(folder)
            raise
