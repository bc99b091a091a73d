"""From a plan to the merged module and the evidence for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pleas.errors import MergeFailed
from pleas.evidence import Evidence
from pleas.network.average import average, contracted
from pleas.network.build import Drawing, build, draw
from pleas.network.module import flops
from pleas.parents import Parents
from pleas.plan.layout import ClassPlan, everyone
from pleas.plan.plan import Plan
from pleas.solve.equations import LayerSolution
from pleas.solve.propagate import Solved, averaged_state, propagate
from pleas.statistics.collect import Progress
from pleas.symmetry import Permutation, execute

WIDENING_TOLERANCE = 1e-3  # relative, in single precision and above
ROUNDING = 16  # steps of the parents' precision that are allowed where it is lower


@dataclass(frozen=True)
class LayerEvidence:
    """What the solve of one layer says about itself.

    residual:  E|W z + b - t|^2 over the target's variance, summed over output units, on the rows it was solved on
    rows, unknowns: rows behind the solve, and unknowns per output unit
    dead:      input units without variance on the proxies; they keep the partial-merge weights
    """

    name: str
    residual: float
    rows: int
    unknowns: int
    dead: tuple[int, ...]


@dataclass(frozen=True, repr=False)
class MergeResult:
    """The merged module and the evidence for it.

    parents, alignments: what was merged, and every parent's permutation into the first one's order
    flops, parent_flops: measured on the modules by FlopCounterMode
    averaged:       tensors that no least squares covers and that were averaged over matched units
    propagate:      how much of a layer's inputs the merged network gave; None without least squares
    held_out_error: squared error of the outputs on held-out proxies, relative to the variance of what they should be;
                    None without least squares
    tried:          the same for every value of `propagate` that was tried
    targets:        "own" where layers were solved for what the parent gives whose domain an image is of, "mean" where
                    for the parents' mean; None without least squares
    contradictions: parents that outvote another on its own images, where `targets` asked
    """

    module: nn.Module
    plan: Plan
    parents: Parents
    alignments: tuple[Permutation, ...]
    layers: tuple[LayerEvidence, ...]
    flops: int
    parent_flops: int
    parameters: int
    averaged: tuple[str, ...]
    propagate: float | None = None
    held_out_error: float | None = None
    tried: Mapping[float, float] = field(default_factory=dict)
    targets: Literal["mean", "own"] | None = None
    contradictions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        error = "" if self.held_out_error is None else f", held-out error {self.held_out_error:.3f}"
        return (
            f"MergeResult({len(self.parents.names)} parents, {self.ratio:.3f}x multiply-adds, "
            f"{self.parameters:,} parameters{error})"
        )

    @property
    def ratio(self) -> float:
        """Multiply-adds relative to one parent, measured."""
        return self.flops / self.parent_flops

    @property
    def mean_residual(self) -> float:
        """Mean over layers of the relative residual."""
        return sum(layer.residual for layer in self.layers) / max(1, len(self.layers))


def assemble(
    evidence: Evidence, plan: Plan, *, least_squares: bool = True, progress: Progress | None = None
) -> MergeResult:
    """Solve every layer for a plan and build the merged module.

    least_squares=False leaves the partial-merge weights as they are: the permutation-only baseline at any
    budget. Raises MergeFailed when the saved module's FLOPs are not the plan's or a solution is not finite.
    """
    parents, program = evidence.parents, evidence.parents.symmetry.program
    drawing = draw(parents, plan)
    solved: list[Solved] = []
    if least_squares:
        solved = propagate(evidence, drawing, parents.settings.candidates, progress=progress)
    best = min(solved, key=_error, default=None)
    state = best.state if best is not None else averaged_state(evidence, drawing)
    module = build(parents, plan, drawing, state)
    if any(p.widened and not p.parts for p in plan.classes.values()):
        check_widening(parents, plan, drawing)
    measured, parent = flops(module, parents.example), flops(parents.modules[0], parents.example)
    if measured != plan.flops:
        raise MergeFailed(
            f"the merged module takes {measured:,} FLOPs where the plan promised {plan.flops:,}: "
            "please report this model"
        )
    covered = set() if best is None else _covered(parents, best)
    return MergeResult(
        module=module,
        plan=plan,
        parents=parents,
        alignments=evidence.alignments,
        layers=() if best is None else tuple(_evidence(*item) for item in best.layers.items()),
        flops=measured,
        parent_flops=parent,
        parameters=sum(p.numel() for p in module.parameters()),
        averaged=tuple(name for name in program.parameters if name not in covered),
        propagate=None if best is None else best.propagate,
        held_out_error=None if best is None else best.held_out_error,
        tried={one.propagate: one.held_out_error for one in solved},
        **_targets(evidence, least_squares),
        notes=(*program.notes, *parents.notes, *plan.notes, *evidence.notes),
    )


def _targets(evidence: Evidence, least_squares: bool) -> dict[str, Any]:
    if not least_squares:
        return {}
    asked = evidence.given is None and evidence.parents.settings.targets != "mean"
    said = tuple(map(str, evidence.contradictions)) if asked else ()
    return {"targets": "mean" if evidence.shares is None else "own", "contradictions": said}


def _error(one: Solved) -> float:
    return one.held_out_error if one.held_out_error == one.held_out_error else float("inf")


def _covered(parents: Parents, solved: Solved) -> set[str]:
    """Names of the parameters that the solve set."""
    found: set[str] = set(solved.fitted)
    for layer in parents.layers:
        if layer.name in solved.layers:
            found |= {layer.weight, *([layer.bias] if layer.bias else [])}
            if layer.norm is not None:
                found |= {name for name in (layer.norm.weight, layer.norm.bias) if name}
    return found


def _evidence(name: str, solution: LayerSolution) -> LayerEvidence:
    return LayerEvidence(
        name,
        solution.relative_residual,
        solution.rows,
        solution.weight.shape[1],
        tuple(solution.dead.tolist()),
    )


@torch.no_grad()
def check_widening(parents: Parents, plan: Plan, drawing: Drawing) -> None:
    """Hold the widened graph against a parent: the first one merged with itself, in these very widths, has to be it.

    Raises MergeFailed where it is not.
    """
    symmetry, state = parents.symmetry, parents.states[0]
    unions = {c: p for c, p in plan.classes.items() if len(p.parts) == 1}
    if (
        unions
    ):  # an output that others know, too, is not the first parent's alone: it is held against one head
        whole = [everyone(parents.count)]
        fused = {c: ClassPlan.of([whole] * p.size, parents.count) for c, p in unions.items()}
        plan = replace(plan, classes={**plan.classes, **fused})
        drawing = draw(parents, plan)
    program, weights = symmetry.program, contracted(symmetry.program)
    names = (*program.parameters, *program.buffers, *program.added)
    alike = [state] * parents.count
    own: dict[str, Tensor] = {
        name: average(name, alike, symmetry, drawing.layouts, weights) for name in names
    }
    module = build(parents, plan, drawing, own)
    generator = torch.Generator().manual_seed(0)
    kind = parents.example.dtype
    images = torch.randn((2, *parents.example.shape[1:]), generator=generator).to(kind)
    cpu = {name: value.cpu() for name, value in state.items()}
    expected, found = execute(program.graph, [cpu], [images])[0], module(images)
    if not bool(expected.isfinite().all()):
        raise MergeFailed("the first parent gives no finite logits for random images: it cannot be checked")
    error = (found[..., : expected.shape[-1]] - expected).abs().max() / expected.abs().max()
    if not float(error) < max(WIDENING_TOLERANCE, ROUNDING * torch.finfo(kind).eps):
        raise MergeFailed(
            f"the graph widened by this plan does not compute what the parents do: merging the first parent with "
            f"itself changes its logits by {float(error):.2g} of their scale. Use budget 1.0, and please report "
            "this model"
        )
