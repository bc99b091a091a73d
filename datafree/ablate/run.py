"""A grid from its first cell to its last: what is finished is not run again, what fails holds nothing up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from datafree.ablate.book import Book, Entry, write_text
from datafree.ablate.cells import Runner
from datafree.ablate.estimate import remaining, spell
from datafree.ablate.grid import Cell
from datafree.ablate.workers import run_in_processes
from datafree.progress import StageProgress

Hear = Callable[[str], None]
TRACE = "error.txt"


@dataclass(frozen=True)
class Schedule:
    """How cells are run. threads: of every process, None: as torch chooses    stages: shows the stages of a cell"""

    jobs: int = 1
    threads: int | None = None
    stages: Callable[[], StageProgress] = StageProgress


def run_cells(
    cells: Sequence[Cell], book: Book, runner: Runner, schedule: Schedule, hear: Hear
) -> list[Entry]:
    """Run what is not finished and write it down, cell by cell; returns the entries of those that failed.

    hear: called with one line for every cell that ended
    """
    todo = [cell for cell in cells if cell.fingerprint not in book.finished(cells)]
    failed: list[Entry] = []
    left = list(todo)
    for cell, entry in _ended(todo, runner, schedule):
        left.remove(cell)
        if entry.trace:
            entry = replace(entry, error=f"{entry.error} ({_trace(book, entry)})", trace="")
        book.add(entry)
        if entry.error:
            failed.append(entry)
        ends = remaining(left, list(book.finished(cells).values()), schedule.jobs)
        hear(_line(cell, entry, len(cells) - len(left), len(cells), ends if left else None))
    return failed


def _ended(cells: Sequence[Cell], runner: Runner, schedule: Schedule) -> Iterator[tuple[Cell, Entry]]:
    if schedule.jobs > 1 and len(cells) > 1:
        yield from run_in_processes(cells, runner, min(schedule.jobs, len(cells)), schedule.threads or 1)
        return
    before = torch.get_num_threads()
    torch.set_num_threads(schedule.threads or before)
    try:
        for cell in cells:
            yield cell, runner(cell, schedule.stages())
    finally:
        torch.set_num_threads(before)


def _trace(book: Book, entry: Entry) -> str:
    """Where the traceback of a bug was written."""
    place = book.place(entry.cell)
    place.mkdir(parents=True, exist_ok=True)
    write_text(place / TRACE, entry.trace)
    return f"traceback in {place / TRACE}"


def _line(cell: Cell, entry: Entry, number: int, count: int, ends: float | None) -> str:
    """`[ 3/24] source noise, seed 0: 85.8 at budget 1 (32 s); about 12 min left`."""
    said = f"failed: {entry.error.splitlines()[0]}" if entry.error else _told(entry)
    left = "" if ends is None else f"; about {spell(ends)} left"
    return f"[{number:{len(str(count))}}/{count}] {cell.title}: {said} ({spell(entry.seconds)}){left}"


def _told(entry: Entry) -> str:
    """The accuracy of the last of every point's networks: refined where there is one."""
    found: dict[str, str] = {}
    for row in entry.rows:
        if row["kind"] in ("merged", "refined") and row["point"] is not None:
            value = row["average"]
            shown = "done" if value is None else f"{100 * value:.1f}"
            found[f"{row['point']['kind']} {row['point']['value']:g}"] = shown
    return ", ".join(f"{shown} at {point}" for point, shown in found.items())
