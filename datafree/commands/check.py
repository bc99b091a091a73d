"""`datafree check RECIPE`: everything a merge would stop at, in seconds; nothing is made or written."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import click
import numpy as np

import pleas
from datafree.errors import DatafreeError, UsageError
from datafree.evaluation.evaluate import Task, check_tasks, load_task
from datafree.progress import StageProgress
from datafree.proxy import SHARD, Source, SourceSpec, check_proxies, find_proxies
from datafree.recipe.file import load_recipe
from datafree.seeds import derive_seed
from datafree.stages import (
    EvaluationSet,
    LoadedParents,
    Work,
    begin,
    check_refining,
    check_rows,
    choose_methods,
    load_oracle,
    load_parents,
    proxy_inputs,
    refine_seed,
    refuse_leak,
    trace_parents,
)
from datafree.tables import output_width, wrapped
from datafree.text import json_text
from pleas.plan.reach import reach
from pleas.statistics.domains import look

MOST_IMAGES = 5000  # of a source or of a task's files, hashed for the leak check; a merge compares all

LOOKED_AT = 128  # proxies that parents are compared on

Bound = list[tuple[SourceSpec, Source, int]]


def run(recipe: str, settings: Sequence[str], device: str, as_json: bool) -> None:
    lines: list[dict[str, str]] = []
    faults = Faults()
    notes: list[str] = []
    try:
        with faults.collected():
            work = begin(load_recipe(recipe, settings), device, StageProgress())
            for part, said in checks(work, faults):
                lines.append({"part": part, "found": said})
                if not as_json:
                    click.echo(wrapped(f"ok  {part:<10} {said}", output_width()))
            notes = list(dict.fromkeys(work.progress.notes))
        faults.raise_all()
    except DatafreeError as error:
        if as_json:
            errors = [_located(line) for line in str(error).splitlines()]
            click.echo(json_text({"ok": False, "errors": errors, "checks": lines, "notes": notes}), nl=False)
        raise
    if as_json:
        click.echo(json_text({"ok": True, "errors": [], "checks": lines, "notes": notes}), nl=False)
        return
    for note in notes:
        click.echo(wrapped(f"note: {note}", output_width()))
    changes = "".join(f" --set {shlex.quote(change)}" for change in settings)
    click.echo(f"{recipe} is ready: datafree merge {recipe}{changes} -o OUT")


class Faults:
    """The mistakes found so far, each once; a check goes on with whatever does not depend on them."""

    def __init__(self) -> None:
        self.messages: dict[str, None] = {}

    @contextmanager
    def collected(self) -> Iterator[None]:
        """A mistake of the caller ends the block and is remembered; what else is raised is not held up."""
        try:
            yield
        except (UsageError, pleas.InputError) as error:
            self.messages[str(error)] = None

    def raise_all(self) -> None:
        """Raises UsageError that lists them, one a line, if there are any."""
        if self.messages:
            raise UsageError("\n".join(self.messages))


def _located(line: str) -> dict[str, str | None]:
    """One line of an error as JSON says it; place: `file:line:column` where it begins with one."""
    match = re.match(r"(?P<place>.+?:[0-9]+:[0-9]+): (?P<message>.*)", line)
    return {"place": None, "message": line} if match is None else match.groupdict()


def checks(work: Work, faults: Faults) -> Iterator[tuple[str, str]]:
    """Each part that was checked and what was found there; mistakes go to `faults`."""
    recipe = work.recipe.recipe
    points = ", ".join(point.label for point in work.points)
    yield "recipe", f"{recipe.name}: {points}; labels {recipe.labels}; seed {recipe.seed}"
    parents = _load_parents(work, faults)
    if parents is not None:
        work.progress.notes.extend(parents.notes)
        yield "parents", _parents(parents)
        if parents.base is not None:
            yield "base", f"{parents.base.reference}, the parents' own architecture"
    known = len(faults.messages)
    tasks = _load_tasks(work, parents, faults)
    if len(faults.messages) == known:
        said = ", ".join(f"{task.name}: {len(task.images)}" for task in tasks.tasks)
        yield "images", said or "no tasks to evaluate on"
    with faults.collected():
        real = load_oracle(work, tasks, verify=False)
        if real is not None:
            yield "oracle", f"{len(real)} of {real.name}"
    if parents is not None:
        yield from _check_work(work, parents, tasks, faults)


def _load_parents(work: Work, faults: Faults) -> LoadedParents | None:
    """All parents; None where something is wrong with any of them, or they do not fit together."""
    with faults.collected():
        return load_parents(work, probe=True)
    return None


def _load_tasks(work: Work, parents: LoadedParents | None, faults: Faults) -> EvaluationSet:
    """The tasks that can be evaluated; without parents nobody knows which outputs there are."""
    recipe, found = work.recipe, []
    for index, spec in enumerate(recipe.recipe.evaluate):
        with faults.collected(), recipe.at("evaluate", index):
            task = load_task(spec, recipe.base, verify=False)
            if parents is not None:
                check_tasks([task], parents.columns(recipe.recipe.labels))
            found.append(task)
    return EvaluationSet(tuple(found))


def _check_work(
    work: Work, parents: LoadedParents, tasks: EvaluationSet, faults: Faults
) -> Iterator[tuple[str, str]]:
    """Proxies and symmetry, for parents that were loaded."""
    recipe = work.recipe.recipe
    with faults.collected():
        with work.recipe.at("proxy"):
            bound = check_proxies(
                recipe.proxy, list(parents.each), work.seed, work.recipe.base, device=str(work.device)
            )
        for _, source, _ in bound:
            work.progress.notes.extend(source.notes)
        yield "proxies", _counts(bound)
        said = _leak(work, bound, tasks, "proxy")
        if said:
            yield "leak", said
        yield from _contradictions(work, parents)
    with faults.collected():
        if recipe.refine is not None and recipe.refine.proxies is not None:
            with work.recipe.at("refine", "proxies"):
                further = check_proxies(
                    recipe.refine.proxies,
                    list(parents.each),
                    refine_seed(work),
                    work.recipe.base,
                    device=str(work.device),
                )
            yield "further proxies", _counts(further)
            said = _leak(work, further, tasks, "refine", "proxies")
            if said:
                yield "leak", said
    with faults.collected():
        networks = trace_parents(work, parents)
        symmetry = networks.symmetry
        work.progress.notes.extend(symmetry.program.notes)
        check_rows(work, networks, recipe.proxy.count)
        check_refining(work, parents, networks)
        with faults.collected():
            methods = choose_methods(work, networks)
            if methods:
                yield "compare", ", ".join(one.name for one in methods)
        most = reach(networks).ratio
        widenable = sum(unit_class.widenable for unit_class in symmetry.classes)
        yield (
            "symmetry",
            f"{len(symmetry.classes)} classes of units, {widenable} can be widened, up to {most:.2f} of one parent; "
            f"verified to {symmetry.gate_error:.0e}",
        )


def _parents(parents: LoadedParents) -> str:
    size = " x ".join(str(side) for side in parents.input.shape)
    count = sum(parameter.numel() for parameter in parents.first.module.parameters())
    outputs = sorted({parent.outputs for parent in parents.each})
    said = f"{len(parents.each)} of {parents.first.reference}, {count:,} parameters"
    return f"{said}, {size} in, {' and '.join(map(str, outputs))} out"


def _counts(bound: Bound) -> str:
    return ", ".join(f"{count} from {spec.model_dump()['kind']}" for spec, _, count in bound)


def _contradictions(work: Work, parents: LoadedParents) -> Iterator[tuple[str, str]]:
    """Whether parents of one head contradict each other, where an earlier run left the proxies in the cache."""
    recipe = work.recipe.recipe
    if recipe.labels != "shared":
        return
    proxies = find_proxies(
        recipe.proxy,
        list(parents.each),
        work.seed,
        work.store.root,
        work.recipe.base,
        device=str(work.device),
    )
    if proxies is None:
        return
    some = proxy_inputs(work, parents, proxies.prefix(min(LOOKED_AT, len(proxies))))
    domains = look([parent.module for parent in parents.each], some, parents.names)
    found = () if domains is None else domains.contradictions
    work.progress.notes.extend(map(str, found))
    yield "agreement", f"{some.count} cached proxies: {_counted(found)}"


def _counted(found: Sequence[object]) -> str:
    if not found:
        return "no parent outvotes another on its own images"
    return "parents contradict each other on each other's proxies"


def _leak(work: Work, bound: Bound, tasks: EvaluationSet, *section: str) -> str:
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
        refuse_leak(work, "the proxies", hashes, sampled, *section, "sources", index)
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
