"""Cells in processes of their own: one that dies takes its cell with it and no other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from datafree.ablate.book import Entry
from datafree.ablate.grid import Cell
from datafree.cache.store import code_fingerprint

Run = Callable[[Cell], Entry]
_PATIENCE = 10.0  # seconds that a process is given to end


def run_in_processes(
    cells: Sequence[Cell], run: Run, jobs: int, threads: int
) -> Iterator[tuple[Cell, Entry]]:
    """Every cell and how it ended, in the order in which they end; `jobs` at a time, each with `threads` threads.

    Cells that share proxies wait for the first of them, which makes these.
    """
    waiting, begun = list(cells), set[str]()
    idle: list[_Worker] = []
    busy: dict[Connection, tuple[_Worker, Cell]] = {}
    try:
        while waiting or busy:
            while (
                len(busy) < jobs
                and (cell := next_cell(waiting, [c for _, c in busy.values()], begun)) is not None
            ):
                waiting.remove(cell)
                worker = idle.pop() if idle else _Worker.started(run, threads)
                worker.pipe.send(cell)
                busy[worker.pipe] = (worker, cell)
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                worker, cell = busy.pop(pipe)
                begun.add(cell.shared)
                try:
                    entry = pipe.recv()
                except EOFError:
                    pipe.close()
                    yield cell, _died(cell, worker)
                    continue
                if isinstance(entry, BaseException):
                    raise entry
                idle.append(worker)
                yield cell, entry
    finally:
        _stop([*idle, *(worker for worker, _ in busy.values())])


def next_cell(waiting: Sequence[Cell], at_work: Sequence[Cell], begun: set[str]) -> Cell | None:
    """The first cell that need not wait for proxies another one is making now; None where all have to.

    begun: `Cell.shared` of the cells that ended
    """
    being_made = {cell.shared for cell in at_work} - begun
    return next((cell for cell in waiting if cell.shared not in being_made), None)


@dataclass(frozen=True)
class _Worker:
    process: SpawnProcess
    pipe: Connection

    @staticmethod
    def started(run: Run, threads: int) -> _Worker:
        context = multiprocessing.get_context("spawn")  # a forked copy of torch's threads would hang
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, run, threads), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        return _Worker(process, ours)


def _serve(pipe: Connection, run: Run, threads: int) -> None:
    """The life of a process: cells in, entries out, until the pipe ends."""
    import torch

    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches every process of a terminal; the first one decides
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            cell = pipe.recv()
            try:
                entry: Entry | BaseException = run(cell)
            except Exception as error:  # noqa: BLE001 - raised again by the process that asked
                entry = error
            pipe.send(entry)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    """A process whose parent was killed would go on to the end of its cell."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _died(cell: Cell, worker: _Worker) -> Entry:
    worker.process.join(_PATIENCE)
    code = worker.process.exitcode
    how = f"exit code {code}"
    if code is not None and code < 0:
        how = signal.Signals(-code).name
        how += ", perhaps for want of memory: lower --jobs" if code == -signal.SIGKILL else ""
    return Entry(
        cell=cell.fingerprint,
        status="failed",
        labels=dict(cell.labels),
        seed=cell.seed,
        seconds=0.0,
        code=code_fingerprint(),
        error=f"its process died ({how})",
    )


def _stop(workers: Sequence[_Worker]) -> None:
    """End all processes, those at work by an interruption, so that they tidy up."""
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        worker.process.join(_PATIENCE)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.pipe.close()
