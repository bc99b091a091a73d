"""`datafree eval FOLDER RECIPE`: a saved artefact on a recipe's tasks."""

from __future__ import annotations

from collections.abc import Sequence

import click

from datafree.artefact.load import Artefact, load
from datafree.errors import UsageError
from datafree.evaluation.evaluate import Columns, check_tasks, evaluate, load_task, merged_columns
from datafree.evaluation.measures import Interval
from datafree.evaluation.scores import Evaluation
from datafree.progress import progress_on
from datafree.recipe.file import load_recipe
from datafree.stages import choose_device, exact_arithmetic
from datafree.tables import text_table
from datafree.text import json_text


def run(folder: str, recipe: str, settings: Sequence[str], device: str, as_json: bool) -> None:
    loaded, chosen = load_recipe(recipe, settings), choose_device(device)
    artefact = load(folder)
    if not loaded.recipe.evaluate:
        raise loaded.error("the recipe has no tasks to evaluate on: add an `evaluate` section")
    columns = _columns(artefact, list(loaded.recipe.parents))
    tasks = []
    with progress_on() as progress, exact_arithmetic():
        with progress.stage("images"):
            for index, spec in enumerate(loaded.recipe.evaluate):
                with loaded.at("evaluate", index):
                    task = load_task(spec, loaded.base)
                    check_tasks([task], columns)
                tasks.append(task)
        with progress.stage("evaluation"):
            found = evaluate(
                artefact.module, tasks, artefact.preprocess, columns, device=chosen, progress=progress
            )
    if as_json:
        click.echo(json_text(found.to_dict()), nl=False)
        return
    click.echo(scores_table(found))


def scores_table(found: Evaluation) -> str:
    """A line per task, and the mean and the joint accuracy where there are any."""
    many = any(score.top5 is not None for score in found.tasks)
    rows = []
    for score in found.tasks:
        name, lowest = score.worst_class
        top5 = ["-" if score.top5 is None else f"{100 * score.top5:.1f}"] if many else []
        measures = [
            _number(score.nll),
            _number(score.calibration),
            str(score.count),
            f"{name} {100 * lowest:.1f}",
        ]
        rows.append([score.task, f"{100 * score.accuracy:.1f}", _span(score.interval), *top5, *measures])
    empty = [""] * (4 + many)
    if found.average is not None and len(rows) > 1:
        rows.append(["average", f"{100 * found.average:.1f}", _span(found.interval), *empty])
    if found.joint is not None:
        rows.append(["joint", f"{100 * found.joint:.1f}", _span(found.joint_interval), *empty])
    top5 = ["top 5 %"] if many else []
    columns = ["task", "accuracy %", "95 %", *top5, "NLL", "calibration error", "images", "worst class"]
    return text_table(columns, rows)


def _span(interval: Interval | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _columns(artefact: Artefact, names: Sequence[str]) -> Columns:
    """The heads of the artefact by the recipe's names of the parents, which may not be those it was merged under."""
    places = None if artefact.columns is None else list(artefact.columns.values())
    sizes = [head.outputs for head in artefact.heads] if places is None else list(map(len, places))
    if artefact.labels != "shared" and len(sizes) != len(names):
        raise UsageError(
            f"{artefact.folder} answers for {len(sizes)} parents, and the recipe has {len(names)}: name as many"
        )
    return merged_columns(artefact.labels, dict(zip(names, sizes * len(names), strict=False)), places)
