"""From images to merged networks: statistics, matching, plan, least squares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

import pleas
from datafree.artefact.save import portable
from datafree.cache.store import Stage
from datafree.evaluation.results import Point
from datafree.images.image_set import ImageSet
from datafree.progress import StageProgress
from datafree.stages.inputs import Inputs, image_inputs
from datafree.stages.parents import LoadedParents
from datafree.stages.work import Work
from pleas.plan.cost import output_places
from pleas.refine import Snapshot
from pleas.solve.equations import check_rows as pleas_check_rows


@dataclass(frozen=True)
class Merged:
    """One merged network and the point it was asked for."""

    point: Point
    result: pleas.MergeResult
    refined: Mapping[str, Any] | None = None  # what refining did, where it was asked for
    snapshots: tuple[Snapshot, ...] = ()  # the network on its way there


def check_rows(work: Work, networks: pleas.Parents, images: int) -> None:
    """Raise before any work if `images` cannot give a layer the rows its least squares need, even at 1.0x."""
    with work.recipe.at("proxy", "count"):
        enough_rows(work.settings, networks, images)


def enough_rows(settings: pleas.MergeSettings, networks: pleas.Parents, images: int) -> None:
    """As `check_rows`, without a recipe. Raises pleas.TooFewRows, naming the layer."""
    solved = int(images * (1 - settings.holdout))
    places_of = output_places(networks.symmetry, networks.layers)
    for layer, places in zip(networks.layers, places_of, strict=True):
        rows = solved * min(places, settings.positions)
        pleas_check_rows(layer, rows, layer.d_in, settings.min_rows)


def gather_evidence(
    work: Work, parents: LoadedParents, networks: pleas.Parents, inputs: Inputs
) -> pleas.Evidence:
    """Second moments of all units from one pass over `inputs`, and the matching they give."""
    meaning = meaning_of_inputs(work, parents, inputs)

    def make() -> Stage:
        statistics = pleas.collect(networks, inputs, images=inputs.count, progress=work.progress)
        return Stage({name: tensor.cpu() for name, tensor in statistics.to_tensors().items()}, None)

    with work.progress.stage("statistics"), work.recipe.at("parents"):
        found = work.finished("statistics", meaning, make)
    with work.progress.stage("matching"):
        evidence = pleas.gather(networks, inputs, statistics=pleas.Statistics.from_tensors(found.tensors))
    for note in evidence.notes:
        work.progress.note(note)
    return evidence


def meaning_of_inputs(work: Work, parents: LoadedParents, inputs: Inputs) -> dict[str, Any]:
    """What the statistics of these images depend on."""
    settings = work.settings
    return {
        "parents": parents.fingerprint,
        "images": inputs.fingerprint,
        "rows": settings.rows,
        "positions": settings.positions,
        "batch": inputs.batch,
        "seed": settings.seed,
        "device": work.device.type,
        "torch": torch.__version__,
    }


def make_plans(work: Work, evidence: pleas.Evidence) -> dict[Point, pleas.Plan]:
    """Which units are fused at every point the recipe asks for."""
    with work.progress.stage("plan"), work.recipe.at("merge"):
        return {point: plan_for(evidence, point) for point in work.points}


def plan_for(evidence: pleas.Evidence, point: Point) -> pleas.Plan:
    return pleas.make_plan(
        evidence,
        budget=point.value if point.kind == "budget" else None,
        apart=point.value if point.kind == "apart" else None,
    )


def solve_plans(
    work: Work, parents: LoadedParents, evidence: pleas.Evidence, plans: Mapping[Point, pleas.Plan]
) -> tuple[Merged, ...]:
    """The merged network of every plan, each layer by least squares, in the form it is saved in.

    A network that an earlier run solved is found in the store.
    """
    with work.progress.stage("least squares"), work.recipe.at("proxy", "count"):
        return tuple(_solved(work, parents, evidence, point, plan) for point, plan in plans.items())


def _solved(
    work: Work, parents: LoadedParents, evidence: pleas.Evidence, point: Point, plan: pleas.Plan
) -> Merged:
    inputs = evidence.inputs
    assert isinstance(inputs, Inputs)
    meaning = {
        **meaning_of_inputs(work, parents, inputs),
        "settings": asdict(work.settings),
        "plan": {str(c): [p.masks.tolist(), p.sources.tolist()] for c, p in plan.classes.items()},
        "base": parents.base is not None,  # of it only that there is one: units are matched from their places
    }
    kept: list[pleas.MergeResult] = []

    def progress(_: str, done: int, total: int) -> None:
        work.progress(point.label, done, total)

    def make() -> Stage:
        result = pleas.assemble(evidence, plan, progress=progress)
        result = replace(result, module=portable(result, parents.first.reference))
        kept.append(result)
        told = {
            "layers": [asdict(layer) for layer in result.layers],
            "averaged": list(result.averaged),
            "propagate": result.propagate,
            "held_out_error": result.held_out_error,
            "tried": [[t, error] for t, error in result.tried.items()],
            "targets": result.targets,
            "contradictions": list(result.contradictions),
        }
        return Stage({name: value.cpu() for name, value in result.module.state_dict().items()}, told)

    stage = work.finished("merged", meaning, make)
    if kept:
        return Merged(point, kept[0])
    result = pleas.assemble(
        evidence, plan, least_squares=False
    )  # the same network, its weights not yet solved
    module = portable(result, parents.first.reference)
    module.load_state_dict(stage.tensors)
    told = stage.value
    layers = tuple(pleas.LayerEvidence(**{**layer, "dead": tuple(layer["dead"])}) for layer in told["layers"])
    result = replace(
        result,
        module=module,
        layers=layers,
        averaged=tuple(told["averaged"]),
        propagate=told["propagate"],
        held_out_error=told["held_out_error"],
        tried=dict(told["tried"]),
        targets=told["targets"],
        contradictions=tuple(told["contradictions"]),
    )
    return Merged(point, result)


def merge_real(
    work: Work, parents: LoadedParents, networks: pleas.Parents, images: ImageSet | None
) -> tuple[Merged, ...]:
    """The oracle: the same merge at every point, from real images; nothing when the recipe has none."""
    if images is None:
        return ()
    with work.progress.stage("oracle"):
        inner = replace(work, progress=StageProgress())  # its steps are one stage to the user
        evidence = gather_evidence(inner, parents, networks, image_inputs(work, parents, images))
        return solve_plans(inner, parents, evidence, make_plans(inner, evidence))
