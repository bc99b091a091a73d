"""`datafree merge RECIPE -o OUT`: the main job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from datafree.evaluation.results import Results, cells, columns, legend
from datafree.pipeline import REPORT, Outcome
from datafree.pipeline import run as run_pipeline
from datafree.progress import progress_on
from datafree.recipe.file import load_recipe
from datafree.tables import output_width, text_table, wrapped
from datafree.text import json_text


def run(
    recipe: str,
    out: str | None,
    settings: Sequence[str],
    device: str,
    overwrite: bool,
    export: bool,
    command: Sequence[str],
    as_json: bool = False,
) -> None:
    loaded = load_recipe(recipe, settings)
    folder = Path(out if out is not None else loaded.recipe.name)
    outcome = run_pipeline(
        loaded,
        folder,
        device=device,
        overwrite=overwrite,
        export=export,
        progress=progress_on(),
        command=[Path(command[0]).name, *command[1:]],
    )
    if as_json:
        content = {
            "folder": str(outcome.folder),
            "artefacts": [str(artefact) for artefact in outcome.artefacts],
            "report": str(outcome.folder / REPORT),
            "metrics": outcome.results.to_dict(),
        }
        click.echo(json_text(content), nl=False)
        return
    click.echo(results_table(outcome.results))
    click.echo(_where(outcome))


def results_table(results: Results) -> str:
    """The table of a run, with the merged networks standing out."""
    ours = [number for number, row in enumerate(results.rows) if row.kind in ("merged", "refined")]
    table = text_table(columns(results), [cells(results, row) for row in results.rows], bold=ours)
    notes = dict.fromkeys(row.note for row in results.rows if row.note)
    said = [f"{note}." for note in (*notes, legend(results)) if note]
    if results.verdict is not None:
        said += ["", f"verdict: {results.verdict.text}"]
    width = output_width()
    return "\n".join(["", table, *(wrapped(line, width) for line in said), ""])


def _where(outcome: Outcome) -> str:
    lines = [f"artefact  {artefact}" for artefact in outcome.artefacts]
    return "\n".join([*lines, f"report    {outcome.folder / REPORT}"])
