"""A whole grid of a few seconds: killed on the way, gone on with, told in rows, a table and a page."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from datafree import pipeline
from datafree.ablate.cells import Runner
from datafree.ablate.grid import load_grid
from datafree.cache.store import CACHE_VARIABLE
from datafree.cli import main
from datafree.errors import RunError
from tests.datafree.tiny import make_tiny

GRID = """\
name: small
recipe: tiny.yaml
set:
  merge.budgets: [1.0]
  merge.propagate: 0.5
  proxy.count: 40
  evaluate.0.images.limit: 10
  evaluate.1.images.limit: 10
axes:
  merge.ridge: [1e-3, 1e-1]
"""
# Is killed before its second cell.
KILLED = """\
import os, signal
from datafree import pipeline
from datafree.cli import main
real, calls = pipeline.run, []
def stop(*given, **named):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given, **named)
pipeline.run = stop
main()
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a grid of two cells."""
    folder = make_tiny(tmp_path_factory.mktemp("ablate") / "tiny").folder
    (folder / "grid.yaml").write_text(GRID)
    return folder


def ablate(tiny: Path, out: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["ablate", str(tiny / "grid.yaml"), "-o", str(out), *options])


def test_a_grid_that_was_killed_goes_on_at_its_next_cell(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    project = str(Path(__file__).resolve().parents[3])
    environment = {**os.environ, CACHE_VARIABLE: str(cache), "PYTHONPATH": project}
    stopped = subprocess.run(
        [sys.executable, "-c", KILLED, "ablate", str(tiny / "grid.yaml"), "-o", str(out)],
        capture_output=True, text=True, check=False, env=environment, timeout=200,
    )  # fmt: skip
    assert stopped.returncode == -signal.SIGKILL, stopped.stderr
    checked, ended = stopped.stderr.splitlines()
    assert checked == "checking 2 of 2 cells, in which every value occurs"
    assert ended.startswith("[1/2] merge.ridge 0.001, seed 0: ")
    before = (out / "cells.jsonl").read_text()
    assert len(list(csv.DictReader((out / "rows.csv").open()))) == 6
    assert list(out.glob(".cell.*"))  # of the cell that was at work

    monkeypatch.setenv(CACHE_VARIABLE, str(cache))
    dry = ablate(tiny, out, "--dry-run")
    assert dry.exit_code == 0
    assert ", done" in dry.stdout
    assert "2 cells, 1 finished; the others take about" in dry.stdout
    done = ablate(tiny, out)
    assert done.exit_code == 0, done.output
    assert f"1 of 2 cells are finished in {out}" in done.stderr
    assert "[2/2] merge.ridge 0.1, seed 0: " in done.stderr
    assert "[1/2]" not in done.stderr
    after = (out / "cells.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == 2
    assert not list(out.glob(".cell.*"))
    _is_whole(out, tiny)


def _is_whole(out: Path, tiny: Path) -> None:
    """Everything a finished grid leaves, and its rows are what each cell's own metrics say."""
    rows = list(csv.DictReader((out / "rows.csv").open()))
    assert len(rows) == 12
    for cell in load_grid(tiny / "grid.yaml").cells:
        place = out / "cells" / cell.fingerprint[:16]
        assert {item.name for item in place.iterdir()} == {
            "metrics.json", "run.json", "report.html", "recipe.resolved.yaml"
        }  # fmt: skip
        metrics = json.loads((place / "metrics.json").read_text())
        assert metrics["recipe"] == cell.fingerprint
        mine = [row for row in rows if row["merge.ridge"] == cell.labels["merge.ridge"]]
        assert [(row["kind"], float(row["average"]), float(row["accuracy rotated"])) for row in mine] == [
            (row["kind"], row["average"], row["tasks"]["rotated"]["accuracy"]) for row in metrics["rows"]
        ]
    assert "2 of 2 cells finished" in (out / "report.html").read_text()
    assert {path.name for path in (out / "plots").iterdir()} == {
        "average-over-merge.ridge.svg",
        "average-heat.svg",
    }


def test_a_cell_that_fails_holds_nothing_up_and_is_tried_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, out = pipeline.run, tmp_path / "out"

    def fail(recipe: object, *given: object, **named: object) -> object:
        if len(list(out.glob("cells/*"))) == 0:
            raise RunError("the network returned NaN")
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(pipeline, "run", fail)
    (out / "cells").mkdir(parents=True)
    (out / "grid.json").write_text('{"datafree": "0", "grid": "small"}')
    failed = ablate(tiny, out)
    assert failed.exit_code == 1
    assert "[1/2] merge.ridge 0.001, seed 0: failed: the network returned NaN" in failed.stderr
    assert failed.stderr.endswith(
        "error: 2 of 2 cells failed, the others are finished; the same command tries them again:\n"
        "  merge.ridge 0.001, seed 0: the network returned NaN\n"
        "  merge.ridge 0.1, seed 0: the network returned NaN\n"
    )
    assert failed.stdout.strip().startswith("rows")
    cell = load_grid(tiny / "grid.yaml").cells[0]
    (out / "cells" / "another").mkdir()
    bug = Runner(out)(cell)
    assert bug.error == "ZeroDivisionError: a bug"
    assert 'raise ZeroDivisionError("a bug")' in bug.trace
    monkeypatch.setattr(pipeline, "run", real)
    assert "2 cells, 0 finished" in ablate(tiny, out, "--dry-run").stdout


def test_what_check_finds_stops_a_grid_before_its_first_cell(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = tiny / "wrong.yaml"
    path.write_text(
        GRID.replace("merge.ridge: [1e-3, 1e-1]", "parents.b.weights: [b.safetensors, c.safetensors]")
    )
    result = CliRunner().invoke(main, ["ablate", str(path), "-o", str(out)])
    assert result.exit_code == 2
    assert result.stderr == (
        "checking 2 of 2 cells, in which every value occurs\n"
        f"error: {tiny / 'tiny.yaml'}:4:3: parents.b: parent b: weights file {tiny / 'c.safetensors'} does not exist: "
        "give a .safetensors, .pt, .pth or .th file (in the cell parents.b.weights c.safetensors, seed 0)\n"
    )
    assert not (out / "cells.jsonl").exists()
