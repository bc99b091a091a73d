"""The folder of a grid: what is finished stays, whatever happened to the process; other folders are left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from datafree.ablate.book import BOOK, Book, Entry, opened
from datafree.ablate.estimate import expected, remaining, spell
from datafree.ablate.grid import load_grid
from datafree.errors import UsageError
from tests.datafree.ablate.test_grid import GRID, written


def entry(cell: str, status: str = "done", seconds: float = 1.0, **labels: str) -> Entry:
    assert status in ("done", "failed")
    return Entry(cell, "done" if status == "done" else "failed", labels, 0, seconds, "code")


def test_what_was_added_is_there_again_and_the_latest_counts(tmp_path: Path) -> None:
    cells = load_grid(written(tmp_path)).cells
    first, second = (cell.fingerprint for cell in cells[:2])
    book = Book(tmp_path)
    for one in (entry(first, "failed"), entry(second, "failed"), entry(first)):
        book.add(one)
    again = Book(tmp_path)
    assert again.entries == book.entries
    assert list(again.finished(cells)) == [first]


def test_a_line_that_was_cut_short_costs_its_own_cell_only(tmp_path: Path) -> None:
    for cell in ("a", "b"):
        Book(tmp_path).add(entry(cell))
    text = (tmp_path / BOOK).read_text()
    (tmp_path / BOOK).write_text(text[:-20])
    assert list(Book(tmp_path).entries) == ["a"]
    assert (tmp_path / BOOK).read_text() == text[:-20]  # another process may be in the middle of the line
    book = Book(tmp_path, mend=True)
    assert list(book.entries) == ["a"]
    assert book.notes == [f"{tmp_path / BOOK}:2: this line is damaged; its cell runs again"]
    book.add(entry("c"))
    assert list(Book(tmp_path).entries) == ["a", "c"]
    assert Book(tmp_path).notes == []


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    grid = load_grid(written(tmp_path))
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("")
    with (
        pytest.raises(
            UsageError, match="holds files that `datafree ablate` did not write, and is left alone"
        ),
        opened(strange, grid),
    ):
        pass  # fmt: skip
    with pytest.raises(UsageError, match="exists and is not a folder"), opened(strange / "thesis.tex", grid):
        pass
    assert [item.name for item in strange.iterdir()] == ["thesis.tex"]


def test_a_folder_of_another_grid_is_refused_with_the_place_of_its_name(tmp_path: Path) -> None:
    out, path = tmp_path / "out", written(tmp_path)
    with opened(out, load_grid(path)) as book:
        book.add(entry("f" * 64))
    (tmp_path / "other.yaml").write_text(GRID.replace("name: small", "name: other"))
    with pytest.raises(UsageError) as raised, opened(out, load_grid(tmp_path / "other.yaml")):
        pass
    assert str(raised.value) == (
        f"{tmp_path / 'other.yaml'}:1:1: name: {out} holds the cells of the grid 'small', not of 'other': choose "
        "another folder"
    )
    with pytest.raises(UsageError) as raised, opened(out, load_grid(path)):
        pass
    assert str(raised.value) == (
        f"{path}:1:1: name: {out} holds 1 cells of another grid called 'small', none of which is in this one: choose "
        "another folder"
    )


def test_a_grid_that_grew_goes_on_in_its_folder(tmp_path: Path) -> None:
    out, grid = tmp_path / "out", load_grid(written(tmp_path))
    with opened(out, grid) as book:
        book.add(entry(grid.cells[0].fingerprint))
    (out / ".cell.left").mkdir()  # by a process that was killed
    grown = load_grid(written(tmp_path, GRID.replace("[3, 5]", "[3, 5, 7]")))
    with opened(out, grown) as book:
        assert len(book.finished(grown.cells)) == 1
        assert not (out / ".cell.left").exists()
        with pytest.raises(UsageError, match="another `datafree ablate` is at work here"), opened(out, grown):
            pass
    assert json.loads((out / "grid.json").read_text())["grid"] == "small"
    assert "seeds: [3, 5, 7]" in (out / "grid.yaml").read_text()


def test_time_comes_from_the_cells_most_alike(tmp_path: Path) -> None:
    cells = load_grid(written(tmp_path)).cells
    told = [
        entry("1", seconds=10, **{"merge.ridge": "0.001", "source": "noise"}),
        entry("2", seconds=30, **{"merge.ridge": "0.1", "source": "noise"}),
        entry("3", seconds=100, **{"merge.ridge": "0.1", "source": "inverted"}),
    ]
    assert [expected(cell, told) for cell in cells[:4]] == [10, 30, (10 + 100) / 2, 100]
    assert remaining(cells[:4], told) == 195
    assert remaining(cells[:4], told, jobs=2) == 97.5
    assert expected(cells[0], []) is None
    assert remaining(cells, []) is None
    assert [spell(seconds) for seconds in (None, 5, 600, 12000)] == ["?", "5 s", "10 min", "3 h 20 min"]
