"""What a grid leaves beside its cells: rows, a table, plots and a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from datafree.ablate.book import Entry, write_text
from datafree.ablate.findings import Findings
from datafree.ablate.table import (
    Table,
    csv_text,
    everything,
    foretellers,
    headline,
    json_lines,
    markdown,
    ranks,
    references,
    tidy,
)
from datafree.tables import text_table

CSV, JSONL, TABLE, PAGE, PLOTS = "rows.csv", "rows.jsonl", "table.md", "report.html", "plots"


def write_rows(folder: Path, findings: Findings) -> None:
    """rows.csv, rows.jsonl and table.md of what is finished, each whole at any time."""
    rows = tidy(findings)
    write_text(folder / CSV, csv_text(rows))
    write_text(folder / JSONL, json_lines(rows))
    write_text(folder / TABLE, markdown_text(findings))


def markdown_text(findings: Findings) -> str:
    parts = [f"# {findings.grid.name}", _finished(findings)]
    for recipe in findings.recipes:
        parts += [f"## {recipe}"] if recipe else []
        for table in tables(findings, recipe):
            parts += [f"**{table.title}**", markdown(table)]
    return "\n\n".join(parts) + "\n"


def tables(findings: Findings, recipe: str) -> list[Table]:
    """All tables of one recipe, those without a row left out."""
    metrics, points = findings.metrics(recipe), findings.points(recipe)
    found = [headline(findings, recipe, metric) for metric in metrics]
    found += [ranks(findings, recipe, point, metric) for metric in metrics for point in points]
    found += [foretellers(findings, recipe, metric) for metric in metrics]
    found += [references(findings, recipe), everything(findings, recipe)]
    return [table for table in found if table.rows]


def summary(findings: Findings) -> str:
    """The headline tables as the terminal shows them."""
    parts = []
    for recipe in findings.recipes:
        for metric in findings.metrics(recipe):
            table = headline(findings, recipe, metric)
            title = f"{recipe}: {table.title}" if recipe else table.title
            parts += ["", f"{title}, %", "", text_table(table.columns, table.rows)]
    return "\n".join([*parts, ""])


def _finished(findings: Findings) -> str:
    done = sum(cell.fingerprint in findings.entries for cell in findings.cells)
    return (
        f"{done} of {len(findings.cells)} cells are finished; seeds {', '.join(map(str, findings.seeds))}. "
        "Accuracies in per cent, mean ± standard deviation over seeds."
    )


def write_page(folder: Path, findings: Findings, failed: Sequence[Entry], command: Sequence[str]) -> None:
    """The plots as files, and report.html with all of them inside."""
    from datafree.ablate.figures import pictures, standalone
    from datafree.ablate.page import page

    found = {recipe: pictures(findings, recipe) for recipe in findings.recipes}
    (folder / PLOTS).mkdir(exist_ok=True)
    for recipe, drawn in found.items():
        for picture in drawn:
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(filter(None, (recipe, picture.name)))).strip("-")
            write_text(folder / PLOTS / f"{name}.svg", standalone(picture.svg))
    write_text(folder / PAGE, page(findings, found, failed, command))
