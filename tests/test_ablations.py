"""Every grid in `recipes/ablations` is well formed: each of its cells is a recipe, and no two are the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from datafree.ablate.grid import load_grid

GRIDS = sorted((Path(__file__).resolve().parent.parent / "recipes" / "ablations").glob("*.yaml"))
CELLS = {
    "budget_curve": 4 * 4 * 3,
    "inversion_steps": 3 * 6 * 3,
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
