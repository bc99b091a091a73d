"""The page of a grid: one self-contained file with its tables and plots."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from datafree.ablate.book import Entry
from datafree.ablate.estimate import spell
from datafree.ablate.figures import Picture
from datafree.ablate.findings import Findings
from datafree.ablate.table import Table, everything, foretellers, headline, ranks, references
from datafree.report.pages import render


def page(
    findings: Findings,
    drawn: Mapping[str, Sequence[Picture]],
    failed: Sequence[Entry],
    command: Sequence[str],
) -> str:
    """drawn: recipe -> its plots"""
    titles = {cell.fingerprint: cell.title for cell in findings.cells}
    entries = list(findings.entries.values())
    return render(
        "ablation.html.j2",
        name=findings.grid.name,
        done=len(findings.entries),
        count=len(findings.cells),
        seeds=findings.seeds,
        time=spell(sum(entry.seconds for entry in entries)),
        sections=[_section(findings, recipe, drawn[recipe]) for recipe in findings.recipes],
        failed=[(titles.get(entry.cell, entry.cell[:16]), entry.error) for entry in failed],
        notes=_notes(entries),
        grid=findings.grid.source.text,
        command=shlex.join(command),
    )


def _notes(entries: Sequence[Entry]) -> list[str]:
    """What the cells' own reports say beside their numbers, each once."""
    uses = Counter(note for entry in entries for note in dict.fromkeys(entry.notes))
    return [
        note if count == len(entries) else f"{note} ({count} of {len(entries)} cells)"
        for note, count in uses.items()
    ]


def _section(findings: Findings, recipe: str, drawn: Sequence[Picture]) -> dict[str, object]:
    metrics, points = findings.metrics(recipe), findings.points(recipe)
    return {
        "recipe": recipe,
        "headlines": _shown(headline(findings, recipe, metric) for metric in metrics),
        "pictures": drawn,
        "rankings": _shown(ranks(findings, recipe, point, metric) for metric in metrics for point in points),
        "foretellers": _shown(foretellers(findings, recipe, metric) for metric in metrics),
        "references": _shown([references(findings, recipe)]),
        "everything": _shown([everything(findings, recipe)]),
    }


def _shown(tables: Iterable[Table]) -> list[Table]:
    return [table for table in tables if table.rows]
