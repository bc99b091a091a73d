"""`datafree ablate GRID -o OUT`: every cell of a grid, and one table over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from datafree.ablate.book import Book, Entry, check_folder, opened
from datafree.ablate.cells import Runner
from datafree.ablate.estimate import expected, remaining, spell
from datafree.ablate.findings import find
from datafree.ablate.grid import Cell, Grid, covering, load_grid
from datafree.ablate.output import PAGE, TABLE, summary, write_page, write_rows
from datafree.ablate.run import Schedule, run_cells
from datafree.cache.store import code_fingerprint
from datafree.commands.check import Faults, checks
from datafree.errors import RunError, UsageError
from datafree.progress import StageProgress, bar_on
from datafree.stages import begin
from datafree.tables import output_width, text_table, wrapped


def run(
    path: str,
    out: str,
    settings: Sequence[str],
    only: Sequence[str],
    device: str,
    jobs: int,
    threads: int | None,
    dry_run: bool,
    networks: bool,
    command: Sequence[str],
) -> None:
    grid, folder = load_grid(path, settings), Path(out)
    cells = grid.only(only)
    check_folder(folder, grid)
    if dry_run:
        _dry_run(cells, Book(folder), jobs)
        return
    with opened(folder, grid) as book:
        for note in [*book.notes, *_of_other_code(cells, book)]:
            _say(f"note: {note}")
        todo = [cell for cell in cells if cell.fingerprint not in book.finished(cells)]
        check_cells(todo, device)
        if len(todo) < len(cells):
            _say(f"{len(cells) - len(todo)} of {len(cells)} cells are finished in {folder}")
        runner = Runner(folder, device, networks, [Path(command[0]).name, *command[1:]])
        heard = partial(_heard, grid, book)
        failed = run_cells(cells, book, runner, Schedule(jobs, threads, bar_on), heard)
        findings = find(grid, grid.cells, book.finished(grid.cells))
        write_rows(folder, findings)
        write_page(folder, findings, failed, runner.command)
    click.echo(summary(findings))
    click.echo(f"rows    {folder / TABLE}, rows.csv, rows.jsonl\nreport  {folder / PAGE}")
    if failed:
        raise RunError(_failures(failed, cells))


def check_cells(cells: Sequence[Cell], device: str) -> None:
    """What `datafree check` finds, for few cells in which every value occurs. Raises UsageError with every mistake.

    A mistake that is not in every cell is told with the first cell that has it.
    """
    chosen, found = covering(cells), dict[str, list[Cell]]()
    if chosen:
        _say(f"checking {len(chosen)} of {len(cells)} cells, in which every value occurs")
    for cell in chosen:
        faults = Faults()
        with faults.collected():
            for _ in checks(begin(cell.recipe, device, StageProgress()), faults):
                pass
        for message in faults.messages:
            found.setdefault(message, []).append(cell)
    if found:
        raise UsageError(
            "\n".join(
                message if len(having) == len(chosen) else f"{message} (in the cell {having[0].title})"
                for message, having in found.items()
            )
        )


def _heard(grid: Grid, book: Book, line: str) -> None:
    """A cell ended: its line, and the rows of all that are finished."""
    _say(line)
    write_rows(book.folder, find(grid, grid.cells, book.finished(grid.cells)))


def _dry_run(cells: Sequence[Cell], book: Book, jobs: int) -> None:
    finished = book.finished(cells)
    entries = list(finished.values())
    axes = list(cells[0].labels) if cells else []
    rows, todo = [], []
    for number, cell in enumerate(cells, 1):
        entry = finished.get(cell.fingerprint)
        if entry is None:
            todo.append(cell)
        time = f"{spell(entry.seconds)}, done" if entry else f"about {spell(expected(cell, entries))}"
        rows.append([str(number), *cell.labels.values(), str(cell.seed), time if entry or entries else "?"])
    click.echo(text_table(["cell", *axes, "seed", "time"], rows, left=["time", *axes]))
    click.echo(f"\n{len(cells)} cells, {len(cells) - len(todo)} finished; {_rest(todo, entries, jobs)}")


def _rest(todo: Sequence[Cell], entries: Sequence[Entry], jobs: int) -> str:
    if not todo:
        return "nothing is left to run"
    seconds = remaining(todo, entries, jobs)
    if seconds is None:
        return "how long the others take is known once one of them has run"
    return f"the others take about {spell(seconds)}" + (f" with --jobs {jobs}" if jobs > 1 else "")


def _of_other_code(cells: Sequence[Cell], book: Book) -> list[str]:
    other = sum(entry.code != code_fingerprint() for entry in book.finished(cells).values())
    if not other:
        return []
    return [
        f"{other} finished cells were run by other code of datafree than this and are kept; to run them again, remove "
        f"{book.folder} or choose another folder"
    ]


def _failures(failed: Sequence[Entry], cells: Sequence[Cell]) -> str:
    titles = {cell.fingerprint: cell.title for cell in cells}
    lines = [f"  {titles[entry.cell]}: {entry.error}" for entry in failed]
    return "\n".join(
        [
            f"{len(failed)} of {len(cells)} cells failed, the others are finished; the same command tries them again:",
            *lines,
        ]
    )


def _say(line: str) -> None:
    click.echo(wrapped(line, output_width()), err=True)
