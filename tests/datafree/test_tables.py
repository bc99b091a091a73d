"""Tables and sentences fit a terminal: broken between words only; in a pipe nothing is broken."""

from __future__ import annotations

import io
import re

import click
import pytest
from rich.console import Console

from datafree import tables
from datafree.progress import TerminalProgress
from datafree.tables import text_table, wrapped

COLUMNS = ["network", "multiply-adds", "accuracy %", "worst class", "remarks"]
ROWS = [
    ["plain average", "1,234,567,890", "10.0", "airplane 0.0", "batch norms re-estimated on the proxies of the recipe"],
    ["merged", "1.25", "91.4", "cat 83.1", "-"],
]  # fmt: skip


def words(text: str) -> list[str]:
    return sorted(re.findall(r"[^\s]+", click.unstyle(text)))


def test_nothing_is_broken_where_there_is_no_terminal() -> None:
    assert text_table(COLUMNS, ROWS, left=["remarks"]).splitlines() == [
        "network        multiply-adds  accuracy %   worst class  remarks",
        "-------------  -------------  ----------  ------------  -------",
        "plain average  1,234,567,890        10.0  airplane 0.0  batch norms re-estimated on the proxies of the recipe",
        "merged                  1.25        91.4      cat 83.1  -",
    ]


@pytest.mark.parametrize("width", [200, 100, 80, 60, 40])
def test_a_narrow_table_holds_every_word_whole(width: int) -> None:
    table = text_table(COLUMNS, ROWS, left=["remarks"], bold=[1], width=width)
    assert max(len(click.unstyle(line)) for line in table.splitlines()) <= width
    assert set(words(text_table(COLUMNS, ROWS, left=["remarks"], width=1000))) - {"-" * 53} <= set(
        words(table)
    ) | {"-" * n for n in range(100)}
    assert click.style("merged", bold=True)[:-4] in table


def test_text_columns_become_several_lines() -> None:
    assert text_table(COLUMNS, ROWS, left=["remarks"], width=80).splitlines() == [
        "network        multiply-adds  accuracy %   worst class  remarks",
        "-------------  -------------  ----------  ------------  -------",
        "plain average  1,234,567,890        10.0  airplane 0.0  batch norms re-estimated",
        "                                                        on the proxies of the",
        "                                                        recipe",
        "merged                  1.25        91.4      cat 83.1  -",
    ]


def test_what_does_not_fit_goes_into_a_second_table() -> None:
    assert text_table(COLUMNS[:4], ROWS[1:], width=40).splitlines() == [
        "network  multiply-adds  accuracy %",
        "-------  -------------  ----------",
        "merged            1.25        91.4",
        "",
        "network  worst class",
        "-------  -----------",
        "merged      cat 83.1",
    ]


def test_sentences_break_between_words_and_paths_never() -> None:
    path = "/very/long/" + "folder/" * 15
    text = wrapped(f"note: the file {path} is not there\nsecond", 40)
    assert path in text
    assert text.splitlines()[-1] == "second"
    assert wrapped("a b c", None) == "a b c"


def test_notes_in_a_terminal_keep_paths_whole() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=40, color_system=None)
    path = "/very/long/" + "folder/" * 15
    TerminalProgress(console).note(f"the file {path} is not there")
    assert path in stream.getvalue()


def test_only_a_terminal_has_a_width(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "80")
    assert tables.output_width(Terminal()) == 80
    assert tables.output_width(io.StringIO()) is None
    monkeypatch.setenv("COLUMNS", "3")
    assert tables.output_width(Terminal()) == 40
