"""Plain text for the terminal: tables and sentences that fit its width, and break between words only.

In a pipe and a log nothing is broken: a line is as long as what it says.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence
from typing import TextIO

import click

_GAP = "  "
_NARROWEST = 40  # columns; a window that claims less is given this


def output_width(stream: TextIO | None = None) -> int | None:
    """Columns of the terminal that `stream` (standard output) is, None where it is none."""
    chosen = stream or sys.stdout
    return max(_NARROWEST, shutil.get_terminal_size().columns) if chosen.isatty() else None


def wrapped(text: str, width: int | None) -> str:
    """`text` broken between words, never inside one, its further lines indented; as it is without a width."""
    if width is None:
        return text
    lines = [
        textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    ]
    return "\n".join(lines)


def text_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Collection[str] = (),
    bold: Collection[int] = (),
    width: int | None = None,
) -> str:
    """Columns padded to their widest cell; the first column and those named in `left` are flush left.

    bold:  numbers of rows that stand out where the output shows styles
    width: columns that there are, by default those of the terminal; a table that is wider is broken into several, each
           with the first column, and text in the columns of `left` is broken between words
    """
    room = width if width is not None else output_width()
    if room is None:
        return _table(columns, rows, range(len(columns)), left, bold, None)
    rest, parts = list(range(1, len(columns))), []
    while rest or not parts:
        chosen = [0]
        while rest and (len(chosen) == 1 or _least(columns, rows, [*chosen, rest[0]], left) <= room):
            chosen.append(rest.pop(0))
        parts.append(_table(columns, rows, chosen, left, bold, room))
    return "\n\n".join(parts)


def _least(
    columns: Sequence[str], rows: Sequence[Sequence[str]], chosen: Sequence[int], left: Collection[str]
) -> int:
    """Columns that a table takes when its text is broken at every space; numbers are never broken."""
    return sum(_narrow(columns, rows, i, left) for i in chosen) + len(_GAP) * (len(chosen) - 1)


def _wide(columns: Sequence[str], rows: Sequence[Sequence[str]], i: int) -> int:
    return max(len(row[i]) for row in (columns, *rows))


def _narrow(columns: Sequence[str], rows: Sequence[Sequence[str]], i: int, left: Collection[str]) -> int:
    if columns[i] not in left:
        return _wide(columns, rows, i)
    return max((len(word) for row in (columns, *rows) for word in row[i].split()), default=0)


def _table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    chosen: Sequence[int],
    left: Collection[str],
    bold: Collection[int],
    room: int | None,
) -> str:
    widths = {i: _wide(columns, rows, i) for i in chosen}
    for i in sorted((i for i in chosen if columns[i] in left), key=lambda i: -widths[i]):
        over = 0 if room is None else sum(widths.values()) + len(_GAP) * (len(chosen) - 1) - room
        if over > 0:
            widths[i] = max(_narrow(columns, rows, i, left), widths[i] - over)
    flush = {i: i == 0 or columns[i] in left for i in chosen}

    def lines(row: Sequence[str]) -> list[str]:
        cells = {i: _cell(row[i], widths[i]) for i in chosen}
        found = []
        for number in range(max(map(len, cells.values()))):
            texts = {i: cell[number] if number < len(cell) else "" for i, cell in cells.items()}
            padded = (t.ljust(widths[i]) if flush[i] else t.rjust(widths[i]) for i, t in texts.items())
            found.append(_GAP.join(padded).rstrip())
        return found

    last = chosen[
        -1
    ]  # flush left, nothing stands to its right: its rule need not be as long as its longest cell
    rules = {**widths, last: len(columns[last])} if flush[last] else widths
    ruled = _GAP.join("-" * min(rules[i], widths[i]) for i in chosen)
    written = [*lines(columns), ruled]
    for number, row in enumerate(rows):
        written += [click.style(line, bold=True) if number in bold else line for line in lines(row)]
    return "\n".join(written)


def _cell(text: str, width: int) -> list[str]:
    if len(text) <= width:
        return [text]
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
