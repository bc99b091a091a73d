"""Plain text tables, the same in a terminal, a pipe and a log."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import click


def text_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Collection[str] = (),
    bold: Collection[int] = (),
) -> str:
    """Columns padded to their widest cell; the first column and those named in `left` are flush left.

    bold: numbers of rows that stand out where the output shows styles
    """
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    flush = [i == 0 or name in left for i, name in enumerate(columns)]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(row, widths, flush, strict=True)
        )
        return "  ".join(padded).rstrip()

    ends_flush = flush[
        -1
    ]  # then nothing stands to its right, and its rule need not be as long as its longest cell
    rules = [*widths[:-1], len(columns[-1]) if ends_flush else widths[-1]]
    lines = [line(columns), "  ".join("-" * width for width in rules)]
    lines += [
        click.style(line(row), bold=True) if number in bold else line(row) for number, row in enumerate(rows)
    ]
    return "\n".join(lines)
