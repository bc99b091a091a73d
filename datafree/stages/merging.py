"""From images to merged networks: statistics, matching, plan, least squares; and the plain averages beside
them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

import pleas
from datafree.artefact import portable
from datafree.images import ImageSet
from datafree.progress import StageProgress
from datafree.results import Point
from datafree.stages.inputs import Inputs, image_inputs
from datafree.stages.parents import Parents, has_batch_norm
from datafree.stages.work import Work
from datafree.store import Stage
from pleas.layers import find_layers
from pleas.plan import output_places
from pleas.refine import Snapshot
from pleas.solve import check_rows as pleas_check_rows
from pleas.statistics import needs_second_pass
from pleas.symmetry import identity


@dataclass(frozen=True)
class Evidence:
    """What the images say: second moments, which unit of B plays the part of which unit of A, and what fusing each
    pair would cost."""

    statistics: pleas.Statistics
    matching: pleas.Permutation
    costs: pleas.FusingCosts


@dataclass(frozen=True)
class Merged:
    """One merged network and the point it was asked for."""

    point: Point
    result: pleas.MergeResult
    refined: Mapping[str, Any] | None = None  # what refining did, where it was asked for
    snapshots: tuple[Snapshot, ...] = ()  # the network on its way there


def check_rows(work: Work, symmetry: pleas.Symmetry, images: int) -> None:
    """Raise before any work if `images` cannot give a layer the rows its least squares need, even at 1.0x."""
    layers, settings = find_layers(symmetry.program), work.settings
    with work.recipe.at("proxy", "count"):
        for layer, places in zip(layers, output_places(symmetry, layers), strict=True):
            rows = images * min(places, settings.positions)
            pleas_check_rows(layer, rows, layer.d_in, settings.min_rows)


def gather_evidence(work: Work, parents: Parents, symmetry: pleas.Symmetry, inputs: Inputs) -> Evidence:
    """Second moments and matching from one pass over `inputs`, two where the network has layers that wait for it."""
    settings, merge = work.settings, work.recipe.recipe.merge
    meaning = {
        "parents": parents.fingerprint,
        "images": inputs.fingerprint,
        "rows": merge.rows,
        "positions": merge.positions,
        "batch": merge.batch,
        "seed": settings.seed,
        "device": work.device.type,
        "torch": torch.__version__,
    }
    a, b = parents.a.module, parents.b.module
    moved_a, moved_b = (copy.deepcopy(module).to(work.device) for module in (a, b))

    def first_pass() -> pleas.Statistics:
        return pleas.collect(
            symmetry, moved_a, moved_b, inputs, settings, images=inputs.count, progress=work.progress
        )

    def second_pass() -> pleas.Statistics:
        both = pleas.collect_grouped(
            symmetry, statistics, matching, moved_a, moved_b, inputs, settings, progress=work.progress
        )
        new = {name: moments for name, moments in both.joint.items() if name not in statistics.joint}
        return replace(both, joint=new, units={}, rows={})

    with work.progress.stage("statistics"), work.recipe.at("parents"):
        statistics = _finished(work, "statistics", meaning, first_pass)
    with work.progress.stage("matching"):
        matching = pleas.match(symmetry, statistics, a, b, settings)
    if needs_second_pass(symmetry):
        with work.progress.stage("matched statistics"), work.recipe.at("parents"):
            meaning |= {"matching": merge.matching, "of": ["groups", "rows", "norms"]}
            second = _finished(work, "grouped", meaning, second_pass)
            joint = {**statistics.joint, **second.joint}
            statistics = replace(statistics, grouped=second.grouped, norms=second.norms, joint=joint)
    with work.progress.stage("fusing costs"):
        costs = pleas.fusing_costs(symmetry, statistics, matching, a, b)
    return Evidence(statistics, matching, costs)


def _finished(
    work: Work, stage: str, meaning: Mapping[str, Any], make: Callable[[], pleas.Statistics]
) -> pleas.Statistics:
    """Statistics from the store, or made now and kept there; always on the CPU."""

    def made() -> Stage:
        return Stage({name: tensor.cpu() for name, tensor in make().to_tensors().items()}, None)

    return pleas.Statistics.from_tensors(work.finished(stage, meaning, made).tensors)


def make_plans(
    work: Work, parents: Parents, symmetry: pleas.Symmetry, evidence: Evidence
) -> dict[Point, pleas.Plan]:
    """Which units are fused at every point the recipe asks for."""
    with work.progress.stage("plan"), work.recipe.at("merge"):
        return {point: _plan(work, parents, symmetry, evidence, point) for point in work.points}


def _plan(
    work: Work, parents: Parents, symmetry: pleas.Symmetry, evidence: Evidence, point: Point
) -> pleas.Plan:
    return pleas.make_plan(
        symmetry,
        evidence.statistics,
        evidence.matching,
        parents.a.module,
        parents.b.module,
        work.settings,
        budget=point.value if point.kind == "budget" else None,
        apart=point.value if point.kind == "apart" else None,
        costs=evidence.costs,
    )


def solve_plans(
    work: Work,
    parents: Parents,
    symmetry: pleas.Symmetry,
    evidence: Evidence,
    plans: Mapping[Point, pleas.Plan],
) -> tuple[Merged, ...]:
    """The merged network of every plan, each layer by least squares, in the form it is saved in."""
    merged = []
    with work.progress.stage("least squares"), work.recipe.at("proxy", "count"):
        for done, (point, plan) in enumerate(plans.items(), 1):
            result = pleas.assemble(
                symmetry,
                evidence.statistics,
                evidence.matching,
                plan,
                parents.a.module,
                parents.b.module,
                work.settings,
                example=parents.example,
            )
            merged.append(Merged(point, replace(result, module=portable(result, parents.a.reference))))
            work.progress(point.label, done, len(plans))
    return tuple(merged)


def average_weights(
    work: Work, parents: Parents, symmetry: pleas.Symmetry, evidence: Evidence, inputs: Inputs
) -> dict[str, pleas.MergeResult]:
    """The parents' weights averaged at 1.0x, units as they come and matched; no least squares.

    Their batch norms are re-estimated on the proxies, because averaged units lose variance (arXiv
    2211.08403).
    """
    plan = _plan(work, parents, symmetry, evidence, Point("apart", 0.0))
    matchings = {"plain average": identity(symmetry), "permutation only": evidence.matching}
    with work.progress.stage("baselines"):
        return {
            name: _average(work, parents, symmetry, replace(evidence, matching=matching), inputs, plan)
            for name, matching in matchings.items()
        }


def _average(
    work: Work,
    parents: Parents,
    symmetry: pleas.Symmetry,
    evidence: Evidence,
    inputs: Inputs,
    plan: pleas.Plan,
) -> pleas.MergeResult:
    result = pleas.assemble(
        symmetry,
        evidence.statistics,
        evidence.matching,
        plan,
        parents.a.module,
        parents.b.module,
        work.settings,
        example=parents.example,
        least_squares=False,
    )
    if not has_batch_norm(symmetry):
        return result
    moved = copy.deepcopy(result.module).to(work.device)
    return replace(result, module=pleas.reestimate_bn(moved, inputs.merged()).cpu())


def merge_real(
    work: Work, parents: Parents, symmetry: pleas.Symmetry, images: ImageSet | None
) -> tuple[Merged, ...]:
    """The oracle: the same merge at every point, from real images; nothing when the recipe has none."""
    if images is None:
        return ()
    with work.progress.stage("oracle"):
        inner = replace(work, progress=StageProgress())  # its steps are one stage to the user
        evidence = gather_evidence(inner, parents, symmetry, image_inputs(work, parents, images))
        plans = make_plans(inner, parents, symmetry, evidence)
        return solve_plans(inner, parents, symmetry, evidence, plans)
