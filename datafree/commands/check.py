"""`datafree check RECIPE`: everything a merge would stop at, in seconds; nothing is made or written."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace

import click
import numpy as np

from datafree.evaluate import Task
from datafree.progress import StageProgress
from datafree.proxy import SHARD, Source, SourceSpec, check_proxies
from datafree.recipe import load_recipe
from datafree.seeds import derive_seed
from datafree.stages import (
    EvaluationSet,
    LoadedParents,
    Work,
    begin,
    check_refining,
    check_rows,
    load_oracle,
    load_parents,
    load_tasks,
    refuse_leak,
    trace_parents,
)
from datafree.text import json_text

MOST_IMAGES = 5000  # of a source or of a task's files, hashed for the leak check; a merge compares all

Bound = list[tuple[SourceSpec, Source, int]]


def run(recipe: str, settings: Sequence[str], device: str, as_json: bool) -> None:
    work = begin(load_recipe(recipe, settings), device, StageProgress())
    lines = []
    for part, said in checks(work):
        lines.append({"part": part, "found": said})
        if not as_json:
            click.echo(f"ok  {part:<10} {said}")
    notes = list(dict.fromkeys(work.progress.notes))
    if as_json:
        click.echo(json_text({"ok": True, "checks": lines, "notes": notes}), nl=False)
        return
    for note in notes:
        click.echo(f"note: {note}")
    changes = "".join(f" --set {shlex.quote(change)}" for change in settings)
    click.echo(f"{recipe} is ready: datafree merge {recipe}{changes} -o OUT")


def checks(work: Work) -> Iterator[tuple[str, str]]:
    """Each part that was checked and what was found there; the first mistake raises UsageError."""
    recipe = work.recipe.recipe
    points = ", ".join(point.label for point in work.points)
    yield "recipe", f"{recipe.name}: {points}; labels {recipe.labels}; seed {recipe.seed}"
    parents = load_parents(work, probe=True)
    work.progress.notes.extend(parents.notes)
    yield "parents", _parents(parents)
    tasks = load_tasks(work, parents, verify=False)
    yield "images", ", ".join(f"{t.name}: {len(t.images)}" for t in tasks.tasks) or "no tasks to evaluate on"
    real = load_oracle(work, tasks, verify=False)
    if real is not None:
        yield "oracle", f"{len(real)} of {real.name}"
    with work.recipe.at("proxy"):
        bound = check_proxies(
            recipe.proxy, list(parents.each), work.seed, work.recipe.base, device=str(work.device)
        )
    for _, source, _ in bound:
        work.progress.notes.extend(source.notes)
    yield "proxies", ", ".join(f"{count} from {spec.model_dump()['kind']}" for spec, _, count in bound)
    said = _leak(work, bound, tasks)
    if said:
        yield "leak", said
    networks = trace_parents(work, parents)
    symmetry = networks.symmetry
    work.progress.notes.extend(symmetry.program.notes)
    check_rows(work, networks, recipe.proxy.count)
    check_refining(work, parents, networks)
    widenable = sum(unit_class.widenable for unit_class in symmetry.classes)
    yield (
        "symmetry",
        f"{len(symmetry.classes)} classes of units, {widenable} can be widened; "
        f"verified to {symmetry.gate_error:.0e}",
    )


def _parents(parents: LoadedParents) -> str:
    size = " x ".join(str(side) for side in parents.input.shape)
    count = sum(parameter.numel() for parameter in parents.first.module.parameters())
    outputs = sorted({parent.outputs for parent in parents.each})
    return f"{len(parents.each)} of {parents.first.reference}, {count:,} parameters, {size} in, {' and '.join(map(str, outputs))} out"


def _leak(work: Work, bound: Bound, tasks: EvaluationSet) -> str:
    """Compare what image sources will give with the tasks; samples of sets that would take more than seconds.

    A sample finds a set that was given twice all but certainly, a few shared images perhaps not; a merge compares all.
    """
    compared, partly = 0, False
    sampled = EvaluationSet(tuple(_sample(task) for task in tasks.tasks))
    partly |= any(len(a.images) < len(b.images) for a, b in zip(sampled.tasks, tasks.tasks, strict=True))
    for index, (spec, source, count) in enumerate(bound):
        if spec.model_dump()["kind"] != "images" or not sampled.tasks:
            continue
        shards = range(-(-min(count, MOST_IMAGES) // SHARD))
        hashes = [digest for number in shards for digest in source.shard(number).facts["hashes"]]
        refuse_leak(work, "the proxies", hashes, sampled, "proxy", "sources", index)
        compared += min(count, len(hashes))
        partly |= len(hashes) < count
    if not compared:
        return ""
    names = ", ".join(f"{len(task.images)} of {task.name}" for task in sampled.tasks)
    said = f"{compared} proxy images compared with {names}"
    if partly:
        work.progress.notes.append(f"leak: {said}, which is a sample; merge compares all of them")
    return said


def _sample(task: Task) -> Task:
    """At most MOST_IMAGES images of a task whose images are files; arrays are quick enough."""
    if isinstance(task.images.images, np.ndarray) or len(task.images) <= MOST_IMAGES:
        return task
    order = np.random.default_rng(derive_seed(0, "leak", task.name)).permutation(len(task.images))
    chosen = np.sort(order[:MOST_IMAGES])
    return replace(task, images=task.images.select(chosen), targets=task.targets[chosen])
