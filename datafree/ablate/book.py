"""The folder of a grid: which cells are finished, one line each, and what they found; whole after any death.

OUT/grid.json     whose folder this is          OUT/cells.jsonl   the book: a line for every cell that ended
OUT/grid.yaml     the grid as it was last run   OUT/cells/ID/     report, metrics and recipe of a finished cell
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from datafree.ablate.grid import Cell, Grid
from datafree.errors import RunError, UsageError
from datafree.folders import MARK, publish
from datafree.text import json_text

MARKED, GRID, BOOK, CELLS, LOCK = "grid.json", "grid.yaml", "cells.jsonl", "cells", ".lock"
BUILDING = ".cell."  # how the folder of a cell at work is called


@dataclass(frozen=True)
class Entry:
    """How one cell ended.

    cell:    fingerprint of its recipe    code: of our sources when it ran
    seconds: wall time; what was found in the cache took none
    rows:    one per network, JSON-able    error: what went wrong, "" where it is done
    scores:  what the parents said of the proxies, without any label
    trace:   where a bug was raised        notes: what the cell's own report says beside its numbers
    """

    cell: str
    status: Literal["done", "failed"]
    labels: Mapping[str, str]
    seed: int
    seconds: float
    code: str
    rows: Sequence[Mapping[str, Any]] = field(default_factory=list)
    scores: Mapping[str, float] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    trace: str = ""
    notes: Sequence[str] = field(default_factory=list)


class Book:
    """The entries of one folder, the latest of every cell; a line is written and on the disk before `add` returns.

    mend: rewrite a book that was cut short. Only who holds the folder's lock may: another process may be writing.
    """

    def __init__(self, folder: Path, *, mend: bool = False) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self.entries: dict[str, Entry] = {}
        self._read(mend)

    def finished(self, cells: Sequence[Cell]) -> dict[str, Entry]:
        """The entries of those of `cells` that are done."""
        found = {cell.fingerprint: self.entries.get(cell.fingerprint) for cell in cells}
        return {key: entry for key, entry in found.items() if entry is not None and entry.status == "done"}

    def add(self, entry: Entry) -> None:
        """Raises RunError where the disk fails; the entries before are untouched."""
        line = json.dumps(asdict(entry), ensure_ascii=False)
        try:
            with (self.folder / BOOK).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(self.folder, error) from error
        self.entries[entry.cell] = entry

    def place(self, cell: str) -> Path:
        """The folder of a cell."""
        return self.folder / CELLS / cell[:16]

    def _read(self, mend: bool) -> None:
        path = self.folder / BOOK
        if not path.exists():
            return
        text = path.read_bytes().decode(errors="replace")
        kept = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                entry = Entry(**json.loads(line))
            except (ValueError, TypeError):
                self.notes.append(f"{path}:{number}: this line is damaged; its cell runs again")
                continue
            kept.append(line)
            self.entries[entry.cell] = entry
        if mend and (self.notes or not text.endswith("\n")):  # a line cut short would swallow the next one
            write_text(path, "".join(line + "\n" for line in kept))


@contextmanager
def opened(folder: Path, grid: Grid) -> Iterator[Book]:
    """The book of `folder`, made if need be, for one process at a time; what a dead one left half-made is removed.

    Raises UsageError for a folder that is another grid's or not ours, and where another process is at work in it.
    """
    check_folder(folder, grid)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise UsageError(
            f"{folder}: another `datafree ablate` is at work here: wait for it, or choose another output folder"
        ) from error
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written ({error.strerror}): choose another output folder, or change its permissions"
        ) from error
    try:
        for left in folder.glob(f"{BUILDING}*"):
            shutil.rmtree(left, ignore_errors=True)
        write_text(folder / MARKED, json_text({MARK: version("datafree"), "grid": grid.name}))
        write_text(folder / GRID, grid.source.text)
        yield Book(folder, mend=True)
    finally:
        lock.release()


def check_folder(folder: Path, grid: Grid) -> None:
    """Raise UsageError for a folder that `grid` may not write in; nothing is changed."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} exists and is not a folder: choose another output folder")
    if not folder.is_dir() or not any(item.name != LOCK for item in folder.iterdir()):
        return
    try:
        content = json.loads((folder / MARKED).read_text(encoding="utf-8"))
        owner = content["grid"] if MARK in content else None
    except (OSError, ValueError, KeyError, TypeError):
        owner = None
    if owner is None:
        raise UsageError(
            f"{folder} holds files that `datafree ablate` did not write, and is left alone: choose another output "
            "folder"
        )
    if owner != grid.name:
        raise grid.source.error(
            ("name",),
            f"{folder} holds the cells of the grid {owner!r}, not of {grid.name!r}: choose another folder",
        )
    book = folder / BOOK
    if book.exists() and book.stat().st_size:
        known = Book(folder).entries
        if known and not any(cell.fingerprint in known for cell in grid.cells):
            raise grid.source.error(
                ("name",),
                f"{folder} holds {len(known)} cells of another grid called {grid.name!r}, none of which is in this "
                "one: choose another folder",
            )


def write_text(path: Path, text: str) -> None:
    """The file `path`, replaced whole or not at all. Raises RunError."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
                file.write(text)
            publish(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> RunError:
    """The error of a disk that is full or was taken away."""
    return RunError(
        f"{path} cannot be written ({error.strerror}): free some space; the finished cells are kept, run the same "
        "command again to go on"
    )
