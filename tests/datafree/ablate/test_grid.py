"""Grids: which cells they have and in which order, and every mistake with its place, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from datafree.ablate.grid import covering, load_grid
from datafree.errors import UsageError
from datafree.recipe.file import load_recipe
from tests.datafree.tiny import RECIPE

GRID = """\
name: small
recipe: tiny.yaml
seeds: [3, 5]
set: {merge.budgets: [1.0]}
axes:
  merge.ridge: [1e-3, 0.1]
  source:
    noise: {proxy.sources: [{kind: noise}]}
    inverted: {proxy.sources: [{kind: inversion}], proxy.count: 96}
"""


def written(folder: Path, text: str = GRID) -> Path:
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "grid.yaml").write_text(text)
    return folder / "grid.yaml"


def with_axes(axes: str, more: str = "") -> str:
    return f"name: small\nrecipe: tiny.yaml\n{more}axes:\n  {axes}\n"


def test_cells_are_the_recipe_with_every_combination_set(tmp_path: Path) -> None:
    grid = load_grid(written(tmp_path))
    expected = {
        load_recipe(
            tmp_path / "tiny.yaml", ["merge.budgets=[1.0]", f"merge.ridge={ridge}", *source, f"seed={seed}"]
        ).recipe.fingerprint()
        for seed in (3, 5)
        for ridge in (1e-3, 0.1)
        for source in (
            ["proxy.sources=[{kind: noise}]"],
            ["proxy.sources=[{kind: inversion}]", "proxy.count=96"],
        )
    }
    assert {cell.fingerprint for cell in grid.cells} == expected
    assert len(grid.cells) == 8


def test_cells_that_share_proxies_follow_each_other_and_the_first_seed_comes_first(tmp_path: Path) -> None:
    titles = [cell.title for cell in load_grid(written(tmp_path)).cells]
    assert titles[:4] == [
        "merge.ridge 0.001, source noise, seed 3",
        "merge.ridge 0.1, source noise, seed 3",
        "merge.ridge 0.001, source inverted, seed 3",
        "merge.ridge 0.1, source inverted, seed 3",
    ]
    assert all(title.endswith("seed 5") for title in titles[4:])


def test_several_recipes_are_an_axis(tmp_path: Path) -> None:
    path = written(tmp_path, GRID.replace("recipe: tiny.yaml", "recipe: {one: tiny.yaml, two: other.yaml}"))
    (tmp_path / "other.yaml").write_text(RECIPE.replace("name: tiny", "name: other"))
    grid = load_grid(path)
    assert [axis.name for axis in grid.axes] == ["recipe", "merge.ridge", "source"]
    assert len(grid.cells) == 16
    assert {(cell.labels["recipe"], cell.recipe.recipe.name) for cell in grid.cells} == {
        ("one", "tiny"),
        ("two", "other"),
    }
    assert len(grid.only(["recipe=two", "seed=3", "source=noise", "source=inverted"])) == 4
    assert len(covering(grid.cells)) == 6  # noise at both ridges and inverted, of each recipe


def test_settings_of_the_command_line_hold_in_every_cell(tmp_path: Path) -> None:
    grid = load_grid(written(tmp_path), ["merge.positions=4", "merge.budgets=[1.2]"])
    assert {
        (cell.recipe.recipe.merge.positions, cell.recipe.recipe.merge.budgets) for cell in grid.cells
    } == {(4, (1.2,))}
    with pytest.raises(UsageError, match=r"^--set merge.ridge=1: the grid varies this key \(merge.ridge\)"):
        load_grid(tmp_path / "grid.yaml", ["merge.ridge=1"])


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("merge.rigde: [1]", "4:17: merge.rigde: unknown key; did you mean 'ridge'?"),
        ("merge.ridge.x: [1]", "4:19: merge.ridge: must be a number, not {'x': 1}"),
        ("merge.ridge: [0.1, -1]", "4:22: merge.ridge: must be greater than 0, not -1"),
        ("merge.ridge: []", "4:3: axes.merge.ridge: an axis is a list of values, or a mapping `label: {key: value}`, "
         "with at least one; it is empty"),
        ("merge.ridge: 0.1", "4:3: axes.merge.ridge: an axis is a list of values, or a mapping `label: {key: value}`, "
         "with at least one; not 0.1"),
        ("merge.ridge: [1, 1.0]", "4:20: axes.merge.ridge.1: 1 is there twice: keep one"),
        ("proxy..count: [1]", "4:18: axes.proxy..count.0: 'proxy..count' is no key of a recipe; spell it as --set "
         "does: proxy.count"),
        ("proxy.sources.3.kind: [noise]", "4:26: proxy.sources is a list of 1: use an index from 0 to 0, not '3'"),
        ("s: {a: 3}", "4:7: axes.s.a: give a mapping of keys of the recipe and their values, for example "
         "{proxy.count: 64}"),
        ("s: {a: {proxy.count: 96}, b: {proxy.cuont: 3}}", "4:33: proxy.cuont: unknown key; did you mean 'count'?"),
        ("s: {a: {proxy.count: 96}, b: {proxy.count: 96}}", "4:29: axes.s.b: the cells (s b, seed 0) and (s a, seed 0) "
         "are the same run: remove one of the two values"),
        ("seed: [1]", "4:3: axes.seed: an axis cannot be called 'seed': give `seeds`"),
        ("ratio: [1]", "4:3: axes.ratio: an axis cannot be called 'ratio', which is a column of the table"),
    ],
)  # fmt: skip
def test_a_mistake_in_an_axis_has_its_place(axes: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, with_axes(axes))
    with pytest.raises(UsageError) as raised:
        load_grid(path)
    assert str(raised.value) == f"{path}:{message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe: tiny.yaml\n", ": name: a grid needs a `name` of letters, digits, '.', '_' and '-', for example "
         "ridge"),
        ("name: a\n", ": recipe: give the path of a recipe, or a mapping `label: path` of several"),
        ("name: a\nrecipe: tyni.yaml\n", ":2:1: recipe: {folder}/tyni.yaml: no such recipe; give the path of a .yaml "
         "file; did you mean {folder}/tiny.yaml?"),
        ("name: a\nrecipe: tiny.yaml\nseeds: [0, 0]\n", ":3:12: seeds.1: the seed 0 is there twice: keep one"),
        ("name: a\nrecipe: tiny.yaml\nseeds: []\n", ":3:1: seeds: give a list of seeds, for example [0, 1, 2]"),
        ("name: a\nrecipe: tiny.yaml\nseeds: [0.5]\n", ":3:9: seeds.0: a seed is a whole number from 0, not 0.5"),
        ("name: a\nrecipe: tiny.yaml\naxis: {}\n", ":3:1: axis: unknown key; did you mean 'axes'?"),
        ("- 1\n", ":1:1: a grid is a mapping (`key: value` lines), but this text is a list"),
        ("name: a\nrecipe: tiny.yaml\nseeds: [1]\nset: {seed: 2}\n", ":4:7: set.seed: the seeds of this grid are given "
         "by `seeds`: remove one of the two"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_grid_has_its_place(text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as raised:
        load_grid(path)
    place = "" if message.startswith(": ") else message
    assert str(raised.value).endswith(message.format(folder=tmp_path).removeprefix(": "))
    assert str(raised.value).startswith(f"{path}{place.format(folder=tmp_path)}" if place else str(path))


def test_all_mistakes_are_told_at_once_and_each_once(tmp_path: Path) -> None:
    path = written(tmp_path, with_axes("merge.ridge: [-1, 0.1]\n  proxy.count: [0, 64]", "seeds: [0, 1]\n"))
    with pytest.raises(UsageError) as raised:
        load_grid(path)
    assert str(raised.value).splitlines() == [
        f"{path}:5:17: merge.ridge: must be greater than 0, not -1",
        f"{path}:6:17: proxy.count: must be greater than or equal to 1, not 0",
    ]


def test_a_part_of_the_grid_that_is_not_there(tmp_path: Path) -> None:
    grid = load_grid(written(tmp_path))
    for choice, message in (
        ("source=nois", "--only source=nois: 'nois' is no value of source; did you mean 'noise'?"),
        ("sorce=noise", "--only sorce=noise: expected AXIS=LABEL; did you mean 'source'?"),
        ("source", "--only source: expected AXIS=LABEL"),
    ):
        with pytest.raises(UsageError) as raised:
            grid.only([choice])
        assert str(raised.value) == message
