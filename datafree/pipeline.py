"""The front door: `run(recipe, out)` reads as the data flow.

recipe -> parents -> images -> symmetry -> proxies -> statistics -> matching -> diagnosis -> plan -> least squares
       -> refine -> comparators -> oracle -> evaluation -> latency -> report
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pleas
from datafree.artefact.description import CARD, Description, make_heads, plan_table
from datafree.artefact.export import check_export, write_exports
from datafree.artefact.save import write_model
from datafree.environment import machine, versions
from datafree.evaluation.results import Results, Row, row_values
from datafree.evaluation.verdict import verdict
from datafree.folders import check_output, new_folder
from datafree.images.image_set import ImageSet
from datafree.models.parent import Parent
from datafree.progress import StageProgress
from datafree.proxy import ProxySet
from datafree.recipe.file import RecipeFile
from datafree.report.pages import html_report, model_card
from datafree.report.sheets import proxy_sheets
from datafree.stages import (
    LoadedParents,
    Merged,
    Work,
    begin,
    caution,
    check_refining,
    check_rows,
    choose_methods,
    compare_methods,
    evaluate_all,
    exact_arithmetic,
    gather_evidence,
    hold_out,
    judge_proxies,
    layer_similarity,
    load_oracle,
    load_parents,
    load_tasks,
    make_plans,
    make_proxies,
    make_refine_proxies,
    measure_barriers,
    merge_real,
    proxy_inputs,
    refine_merged,
    solve_plans,
    time_networks,
    trace_parents,
)
from datafree.text import json_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECIPE, RESOLVED, METRICS, RECORD, REPORT = (
    "recipe.yaml",
    "recipe.resolved.yaml",
    "metrics.json",
    "run.json",
    "report.html",
)


@dataclass(frozen=True, repr=False)
class Outcome:
    """What a run left: the folder, one artefact folder per merged network, and how the networks compare."""

    folder: Path
    artefacts: tuple[Path, ...]
    merged: tuple[Merged, ...]
    results: Results
    record: dict[str, Any]

    def __repr__(self) -> str:
        points = " and ".join(one.point.label for one in self.merged)
        plural = "s" * (len(self.merged) != 1)
        return f"Outcome({self.folder}: {len(self.merged)} network{plural}, {points})"

    def rows(self) -> list[dict[str, Any]]:
        """One a network: its label, accuracy by task (fractions), their average, predicted error, cost."""
        return [row_values(row, self.results.tasks) for row in self.results.rows]

    def to_frame(self) -> Any:
        """`rows()` as a pandas.DataFrame. Raises UsageError where pandas is not installed."""
        from datafree.library.frames import frame_of

        return frame_of(self.rows())

    def plot(self) -> Figure:
        """Accuracy against multiply-adds, as a matplotlib figure."""
        from datafree.library.judging import accuracy_figure

        return accuracy_figure(self.results.rows)


def run(
    recipe: RecipeFile,
    out: str | Path,
    *,
    device: str = "auto",
    overwrite: bool = False,
    export: bool = False,
    progress: StageProgress | None = None,
    command: Sequence[str] = (),
) -> Outcome:
    """Merge what `recipe` names and write the folder `out`, whole or not at all.

    device:  "auto", "cpu" or "cuda"
    export:  also write a torch.export program and ONNX
    command: the command line, for the record
    """
    started, out = time.perf_counter(), Path(out)
    check_output(out, overwrite=overwrite)
    if export:
        check_export()
    work = begin(recipe, device, progress)
    with work.progress, exact_arithmetic():
        parents = load_parents(work)
        tasks = load_tasks(work, parents)
        real = load_oracle(work, tasks)
        networks = trace_parents(work, parents)
        check_rows(work, networks, recipe.recipe.proxy.count)
        check_refining(work, parents, networks)
        methods = choose_methods(work, networks)
        proxies = make_proxies(work, parents, tasks)
        more = make_refine_proxies(work, parents, tasks)
        inputs = proxy_inputs(work, parents, proxies)
        evidence = gather_evidence(work, parents, networks, inputs)
        looks = judge_proxies(work, parents, proxies, evidence)
        plans = make_plans(work, evidence)
        merged = solve_plans(work, parents, evidence, plans)
        every = [proxies] if more is None else [proxies, more]
        refined = refine_merged(work, parents, evidence, every, merged)
        compared = compare_methods(work, parents, evidence, methods)
        oracles = merge_real(work, parents, networks, real)
        cautions = caution(networks, compared)
        held = hold_out(work, every, evidence)
        rows, curves = evaluate_all(work, parents, tasks, compared, merged, refined, oracles, cautions, held)
        barriers = measure_barriers(work, parents, evidence, tasks)
        final = refined or merged
        latency = time_networks(work, parents, {one.point.label: one.result.module for one in final})
        with work.progress.stage("report"):
            results = _results(work, parents, networks, proxies, merged, rows, looks)
            results = replace(results, barriers=barriers)
            seconds = time.perf_counter() - started
            record = _record(work, parents, proxies, more, real, seconds, command)
            record["proxies"]["diagnosis"] = looks
            record["compare"] = {one.name: one.told() for one in compared}
            record["refine"] = {
                one.point.label: {**one.refined, "curve": curves.get(one.point, [])}
                for one in refined
                if one.refined
            }
            record["latency"] = latency
            record["similarity"] = layer_similarity(evidence)
            artefacts = _write(work, out, parents, proxies, final, results, record, overwrite, export)
    return Outcome(out, artefacts, final, results, record)


# what is said -----------------------------------------------------------------------------------------------


def _results(
    work: Work,
    parents: LoadedParents,
    networks: pleas.Parents,
    proxies: ProxySet,
    merged: Sequence[Merged],
    rows: tuple[Row, ...],
    looks: Mapping[str, Any],
) -> Results:
    """The numbers, and every note: those that were not said when they came up are said now."""
    recipe = work.recipe.recipe
    plans = {
        one.point: {
            "flops": one.result.flops,
            "ratio": one.result.ratio,
            "held_out_error": one.result.held_out_error,
            "propagate": one.result.propagate,
            "tried": [[t, error] for t, error in one.result.tried.items()],
            "targets": one.result.targets,
            "mean_residual": one.result.mean_residual,
            "classes": plan_table(networks, one.result.plan),
        }
        for one in merged
    }
    notes = [
        *parents.notes,
        *networks.symmetry.program.notes,
        *networks.symmetry.notes,
        *networks.notes,
        *proxies.notes,
        *_dead(merged),
        *work.progress.notes,
    ]
    notes = list(dict.fromkeys(notes))
    for note in notes:
        if note not in work.progress.notes:
            work.progress.note(note)
    results = Results(
        name=recipe.name,
        fingerprint=recipe.fingerprint(),
        labels=recipe.labels,
        tasks=tuple(task.name for task in recipe.evaluate),
        rows=rows,
        layers={one.point: one.result.layers for one in merged},
        plans=plans,
        notes=tuple(notes),
    )
    seen = {source["source"]: source["looks"] for source in looks["sources"]}
    return replace(results, verdict=verdict(results, seen, refined=recipe.refine is not None))


def _dead(merged: Sequence[Merged]) -> list[str]:
    """Units that never vary on the proxies, named once: the narrowest network sees them all."""
    narrowest = min(merged, key=lambda one: one.result.flops)
    dead = [f"{layer.name} ({len(layer.dead)})" for layer in narrowest.result.layers if layer.dead]
    if not dead:
        return []
    shown = ", ".join(dead[:8]) + (f" and {len(dead) - 8} more layers" if len(dead) > 8 else "")
    return [f"input units that are constant on the proxies keep their averaged weights: {shown}"]


def _record(
    work: Work,
    parents: LoadedParents,
    proxies: ProxySet,
    more: ProxySet | None,
    real: ImageSet | None,
    seconds: float,
    command: Sequence[str],
) -> dict[str, Any]:
    """`run.json`: where, when and how; the numbers are in `metrics.json`."""
    return {
        "name": work.recipe.recipe.name,
        "seed": work.seed,
        "device": str(work.device),
        "command": shlex.join(command),
        "seconds": round(seconds, 3),
        "memory": {stage: round(peak) for stage, peak in work.progress.memory.items()},
        "timings": {stage: round(spent, 3) for stage, spent in work.progress.timings.items()},
        "proxies": {
            "count": len(proxies),
            "fingerprint": proxies.fingerprint,
            "sources": _sources(proxies),
            "for_refining": [] if more is None else _sources(more),
        },
        "oracle": None if real is None else len(real),
        "parents": _describe(parents.each),
        "base": None if parents.base is None else _describe([parents.base])[parents.base.name],
        "versions": versions(),
        "machine": machine(),
    }


def _sources(proxies: ProxySet) -> list[dict[str, Any]]:
    return [
        {
            "kind": source.kind,
            "count": source.count,
            "seconds_per_1000": source.seconds_per_1000,
            "spec": dict(source.spec),
            "facts": dict(source.facts),
        }
        for source in proxies.manifest
    ]


def _describe(parents: Sequence[Parent]) -> dict[str, Any]:
    return {
        parent.name: {
            "reference": parent.reference,
            "arguments": dict(parent.arguments),
            "weights": None if parent.weights is None else parent.weights.name,
            "pretrained": parent.pretrained,
            "fingerprint": parent.fingerprint,
            "preprocess": parent.preprocess.to_dict(),
        }
        for parent in parents
    }


# what is written --------------------------------------------------------------------------------------------


def _write(
    work: Work,
    out: Path,
    parents: LoadedParents,
    proxies: ProxySet,
    merged: Sequence[Merged],
    results: Results,
    record: dict[str, Any],
    overwrite: bool,
    export: bool,
) -> tuple[Path, ...]:
    """One artefact in `out` itself, or one per point in folders inside it with the report over all of them."""
    recipe = work.recipe
    shared = {
        RECIPE: recipe.source.text,
        METRICS: json_text(results.to_dict()),
        RECORD: json_text(record),
        REPORT: html_report(results, record, recipe.resolved(out), proxy_sheets(proxies)),
    }
    sources = record["proxies"]["sources"] + record["proxies"]["for_refining"]
    inside = [Path() if len(merged) == 1 else Path(one.point.folder) for one in merged]
    with new_folder(out, overwrite=overwrite) as building:
        for one, place in zip(merged, inside, strict=True):
            folder = building / place
            folder.mkdir(exist_ok=True)
            description = _description(recipe, parents, one)
            write_model(folder, one.result.module, one.result, description)
            card = model_card(description, one.result, results, sources)
            texts = {CARD: card, RECIPE: recipe.source.text, RESOLVED: recipe.resolved(out / place)}
            _write_texts(folder, texts)
            if export:
                write_exports(folder, one.result.module, parents.example)
        _write_texts(building, {**shared, RESOLVED: recipe.resolved(out)})
    return tuple(out / place for place in inside)


def _write_texts(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _description(recipe: RecipeFile, parents: LoadedParents, one: Merged) -> Description:
    spec = recipe.recipe
    classes = [next((parent.classes for parent in parents.each if parent.classes), None)]
    sizes = [parents.first.outputs]
    if spec.labels == "separate":
        classes = [parent.classes for parent in parents.each]
        sizes = [parent.outputs for parent in parents.each]
    if parents.union is not None:
        classes, sizes = [parents.union.classes], [len(parents.union.classes)]
    return Description(
        name=f"{spec.name}, {one.point.label}",
        heads=make_heads(sizes, parents.names, classes),
        reference=parents.first.reference,
        arguments=parents.first.arguments,
        input=parents.input,
        recipe=spec.fingerprint(),
        license=spec.license,
        base_models=spec.base_models,
        details={
            "labels": spec.labels,
            "point": {"kind": one.point.kind, "value": one.point.value},
            "parents": _describe(parents.each),
            **(
                {}
                if parents.places is None
                else {"columns": dict(zip(parents.names, parents.places, strict=True))}
            ),
        },
    )
