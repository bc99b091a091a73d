"""Output folders that are whole or not there: built under a temporary name beside their place, renamed at
the end.
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
        Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)).rmdir()
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
    """A temporary folder to fill; it takes the place of `folder` when the block ends well, and vanishes
    otherwise.

    Raises UsageError as `check_output` does, RunError when the disk fails while the block writes.
    """
    check_output(folder, overwrite=overwrite)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        publish(building)  # mkdtemp makes it private
        yield building
        _put_in_place(building, folder)
    except OSError as error:
        raise RunError(
            f"{folder} could not be written ({error}): nothing was left behind; free space and repeat"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def publish(path: Path) -> None:
    """Give a file or folder that was made private the permissions that an ordinary new one has."""
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _put_in_place(building: Path, folder: Path) -> None:
    if not folder.exists():
        building.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    folder.replace(old / "old")
    try:
        building.rename(folder)
    except OSError:
        (old / "old").rename(folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
