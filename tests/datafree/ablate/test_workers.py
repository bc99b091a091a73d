"""Cells in processes: all of them end, one process that dies takes one cell, shared proxies are made once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

from datafree.ablate.book import Entry
from datafree.ablate.grid import Cell, load_grid
from datafree.ablate.workers import next_cell, run_in_processes
from tests.datafree.ablate.test_grid import written


def end(cell: Cell) -> Entry:
    """A cell that says who ran it with how many threads, or kills its process."""
    if cell.labels["source"] == "inverted" and cell.labels["merge.ridge"] == "0.1":
        os.kill(os.getpid(), signal.SIGKILL)
    rows = [{"process": os.getpid(), "threads": torch.get_num_threads()}]
    return Entry(cell.fingerprint, "done", cell.labels, cell.seed, 0.1, "code", rows)


def test_a_process_that_is_killed_takes_one_cell_with_it(tmp_path: Path) -> None:
    cells = [cell for cell in load_grid(written(tmp_path)).cells if cell.seed == 3]
    found = {cell.title: entry for cell, entry in run_in_processes(cells, end, jobs=2, threads=1)}
    assert len(found) == len(cells) == 4
    killed = found.pop("merge.ridge 0.1, source inverted, seed 3")
    assert killed.status == "failed"
    assert killed.error == "its process died (SIGKILL, perhaps for want of memory: lower --jobs)"
    assert {entry.status for entry in found.values()} == {"done"}
    assert {entry.rows[0]["threads"] for entry in found.values()} == {1}
    assert os.getpid() not in {entry.rows[0]["process"] for entry in found.values()}


def test_a_cell_waits_for_proxies_that_another_is_making(tmp_path: Path) -> None:
    noise, noisy, inverted, *_ = load_grid(written(tmp_path)).cells
    assert noise.shared == noisy.shared != inverted.shared
    assert next_cell([noise, noisy, inverted], [], set()) is noise
    assert next_cell([noisy, inverted], [noise], set()) is inverted
    assert next_cell([noisy], [noise, inverted], set()) is None
    assert next_cell([noisy], [inverted], {noise.shared}) is noisy
