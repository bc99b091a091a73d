"""Every grid in `recipes/ablations` is well formed: each of its cells is a recipe, and no two are the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from datafree.ablate.grid import load_grid

PROJECT = Path(__file__).resolve().parent.parent
GRIDS = sorted((PROJECT / "recipes" / "ablations").glob("*.yaml"))
PUBLISHED = sorted((PROJECT / "benchmarks" / "results").glob("propagate*.md"))
CELLS = {
    "budget_curve": 4 * 4 * 3,
    "inversion_steps": 3 * 6 * 3,
    "methods": 3 * 3,
    "mobilenets": 4,
    "proxy_count": 3 * 5 * 3,
    "proxy_sources": 3 * 8 * 3,
    "ridge": 3 * 15 * 3,
}


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_cell_of_every_grid_is_a_recipe(path: Path) -> None:
    grid = load_grid(path)
    assert grid.name == path.stem.replace("_", "-")
    assert len({cell.fingerprint for cell in grid.cells}) == len(grid.cells) == CELLS[path.stem]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_make_evidence_runs_the_command_of_every_published_table(path: Path) -> None:
    makefile = " ".join((PROJECT / "Makefile").read_text().replace("\\\n", " ").split())
    command = path.read_text().splitlines()[0].strip("`")
    assert command.startswith("python -m benchmarks.propagate ")
    assert f"$(BIN)/{command}" in makefile
