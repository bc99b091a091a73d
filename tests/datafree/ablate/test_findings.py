"""Many rows to few numbers: means over seeds, ranks with ties, what foretold the accuracy, files of it all."""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from datafree.ablate.book import Entry
from datafree.ablate.findings import Findings, find
from datafree.ablate.grid import Cell, load_grid
from datafree.ablate.output import markdown_text, summary, write_page, write_rows
from datafree.ablate.table import headline, ranks
from tests.datafree.ablate.test_grid import written

GRID = """\
name: made-up
recipe: {one: tiny.yaml}
seeds: [0, 1, 2]
axes:
  proxy.count: [64, 128, 1024]
  source:
    noise: {proxy.sources: [{kind: noise}]}
    inverted: {proxy.sources: [{kind: inversion}]}
"""
SHAKE = (0.0, 0.01, -0.01)  # of the seeds
GAIN = {"64": 0.0, "128": 0.1, "1024": 0.11}


def row(kind: str, network: str, average: float, budget: float | None = None) -> dict[str, Any]:
    point = None if budget is None else {"kind": "budget", "value": budget}
    return {
        "kind": kind, "network": network, "point": point, "tasks": {"t": average, "u": average}, "average": average,
        "joint": None, "predicted": 1 - average if kind == "merged" else None, "propagate": None,
        "ratio": budget or 1.0, "flops": 10, "parameters": 5, "note": "",
    }  # fmt: skip


def accuracy(cell: Cell) -> float:
    """Inverted is better than noise always, 1,024 images better than 128 only with half of the seeds."""
    source = 0.3 if cell.labels["source"] == "inverted" else 0.0
    many = GAIN[cell.labels["proxy.count"]]
    luck = SHAKE[cell.seed] if cell.labels["proxy.count"] == "1024" else 0.0
    return 0.4 + source + many + 2 * luck + SHAKE[cell.seed]


def rows_of(cell: Cell) -> list[dict[str, Any]]:
    value = accuracy(cell)
    return [
        row("parent", "parent a", 0.95),
        row("ensemble", "ensemble", 0.97),
        row("baseline", "permutation only", 0.3),
        row("merged", "merged", value, 1.0),
        row("merged", "merged", value + 0.1, 1.5),
        row("oracle", "oracle", 0.9, 1.0),
    ]


Rows = Callable[[Cell], list[dict[str, Any]]]


def found_in(folder: Path, text: str = GRID, rows: Rows = rows_of, left_out: int = 0) -> Findings:
    grid = load_grid(written(folder, text))
    entries: Mapping[str, Entry] = {
        cell.fingerprint: Entry(
            cell.fingerprint,
            "done",
            cell.labels,
            cell.seed,
            7.0,
            "code",
            rows(cell),
            {"spread": accuracy(cell)},
        )
        for cell in grid.cells[left_out:]
    }
    return find(grid, grid.cells, entries)


def test_means_and_deviations_are_over_seeds(tmp_path: Path) -> None:
    table = headline(found_in(tmp_path), "one", "average")
    assert table.columns == ("network", "budget 1", "budget 1.5")
    values = [100 * (0.7 + shake) for shake in SHAKE]
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    assert table.rows[1] == (
        "proxy.count 64, inverted",
        f"{mean:.1f} ± {deviation:.1f}",
        f"{mean + 10:.1f} ± {deviation:.1f}",
    )
    assert len(table.rows) == 6


def test_networks_that_chance_may_have_ordered_share_a_rank(tmp_path: Path) -> None:
    places = found_in(tmp_path).ranking("one", "budget 1", "average")
    assert [(place.rank, place.line.title) for place in places] == [
        (1, "proxy.count 1024, inverted"),
        (1, "proxy.count 128, inverted"),
        (3, "proxy.count 64, inverted"),
        (4, "proxy.count 1024, noise"),
        (4, "proxy.count 128, noise"),
        (6, "proxy.count 64, noise"),
    ]


def test_with_one_seed_a_tenth_of_a_per_cent_decides(tmp_path: Path) -> None:
    found = found_in(tmp_path, left_out=-6)  # of three seeds one is finished
    assert found.seeds == [2]
    found = found_in(tmp_path, GRID.replace("[0, 1, 2]", "[0]"))
    assert [place.rank for place in found.ranking("one", "budget 1", "average")] == [1, 2, 3, 4, 5, 6]


def test_methods_of_a_grid_without_axes_stand_against_each_other(tmp_path: Path) -> None:
    def rows(cell: Cell) -> list[dict[str, Any]]:
        return [
            row("merged", "merged", 0.5 + SHAKE[cell.seed], 1.0),
            row("merged", "merged", 0.8, 1.5),
            row("comparator", "RegMean", 0.6 + SHAKE[cell.seed]),
            {**row("comparator", "ZipIt", 0.7), "ratio": 1.3},
            row("baseline", "permutation only", 0.2),
        ]

    text = "name: methods\nrecipe: tiny.yaml\nseeds: [0, 1, 2]\nset: {proxy.count: 96}\n"
    grid = load_grid(written(tmp_path, text))
    entries = {
        cell.fingerprint: Entry(cell.fingerprint, "done", {}, cell.seed, 1.0, "", rows(cell))
        for cell in grid.cells
    }
    found = find(grid, grid.cells, entries)
    assert headline(found, "", "average").rows == (
        ("merged", "50.0 ± 1.0", "80.0", "-"),
        ("RegMean", "60.0 ± 1.0", "-", "-"),
        ("permutation only", "20.0", "-", "-"),
        ("ZipIt", "-", "-", "70.0 at 1.30x"),
    )
    assert [cells[:2] for cells in ranks(found, "", "budget 1", "average").rows] == [
        ("RegMean", "1"),
        ("merged", "2"),
        ("permutation only", "3"),
    ]


def test_what_foretold_the_accuracy(tmp_path: Path) -> None:
    assert found_in(tmp_path).foretold("one", "budget 1", "average") == {
        "predicted": pytest.approx(-1.0),
        "spread": pytest.approx(1.0),
    }


def test_rows_are_tidy_and_the_same_in_both_files(tmp_path: Path) -> None:
    write_rows(tmp_path, found_in(tmp_path, left_out=4))
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == len(lines) == 6 * 14
    first = next(row for row in rows if row["kind"] == "merged")
    assert list(first) == [
        "recipe", "proxy.count", "source", "seed", "kind", "network", "budget", "apart", "accuracy t", "accuracy u",
        "average", "joint", "predicted", "propagate", "ratio", "flops", "parameters", "proxies spread", "seconds",
        "cell",
    ]  # fmt: skip
    for row_, line in zip(rows, lines, strict=True):
        assert {key: "" if value is None else str(value) for key, value in line.items()} == row_
    assert "14 of 18 cells are finished; seeds 0, 1, 2." in (tmp_path / "table.md").read_text()


def test_tables_hold_what_there_is(tmp_path: Path) -> None:
    found = found_in(tmp_path)
    text = markdown_text(found)
    assert "| proxy.count 64, inverted | 70.0 ± 1.0 | 80.0 ± 1.0 |" in text
    assert "| parent a | 95.0 | 95.0 | 95.0 | 1.000 |" in text
    assert "| 64 | noise | permutation only |  | 3 | 30.0 |" in text
    assert "one: Accuracy, average of the tasks, %" in summary(found)


def test_the_page_is_one_file_and_every_plot_is_a_picture(tmp_path: Path) -> None:
    failed = Entry("f" * 64, "failed", {}, 0, 1.0, "code", error="the disk <is> full")
    found = found_in(tmp_path)
    for number, entry in enumerate(found.entries.values()):
        found = replace(
            found,
            entries={
                **found.entries,
                entry.cell: replace(entry, notes=["all", *(["one"] if not number else [])]),
            },
        )
    write_page(tmp_path, found, [failed], ["datafree", "ablate"])
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {
        "one-average-over-proxy.count.svg",
        "one-average-over-cost.svg",
        "one-average-heat.svg",
    }
    for path in (tmp_path / "plots").iterdir():
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in path.read_text()
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "the disk &lt;is&gt; full" in page
    assert "<li>all</li>\n<li>one (1 of 18 cells)</li>" in page
    assert not re.findall(r"(?:src|href)=\"(?!#)|url\((?!#)|@import", page)
