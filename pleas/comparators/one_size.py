"""What most comparators have in common: tensors, units in one order, become a network of one parent's size."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from torch import Tensor, nn

from pleas.comparators.comparator import Case, Comparator, State
from pleas.comparators.repair import closed_form, reestimated
from pleas.comparators.rescaling import rescaled, touches_output
from pleas.errors import InputError
from pleas.evidence import Evidence
from pleas.matching.match import match
from pleas.network.build import Drawing, build, draw
from pleas.plan.plan import Plan, make_plan
from pleas.solve.propagate import averaged_state
from pleas.symmetry import identity

Repair = Literal["none", "proxies", "closed", "rescale"]
Ranges = Mapping[str, tuple[float, float]]
Order = Literal["recipe", "none", "weights", "activations"]


@dataclass(frozen=True)
class Canvas:
    """A network of one parent's size that is still to get its weights; with separate heads it has all of them.

    evidence: the parents in the order of units that is merged
    averaged: the mean of their tensors, and of separate heads each
    """

    evidence: Evidence
    plan: Plan
    drawing: Drawing
    averaged: dict[str, Tensor]

    @classmethod
    def of(cls, evidence: Evidence) -> Canvas:
        plan = make_plan(evidence, apart=0.0)
        drawing = draw(evidence.parents, plan)
        return cls(evidence, plan, drawing, averaged_state(evidence, drawing))

    def network(self, state: State, repair: Repair = "none") -> nn.Module:
        """The network with these tensors, the mean for those that are left out; separate heads stay as they are.

        repair: how its batch norms get their statistics: as in `state`, from the proxies, or in closed form; and
                whether layers without one are rescaled
        """
        heads = self.heads
        tensors = self.averaged | {name: value for name, value in state.items() if name not in heads}
        if repair == "closed":
            tensors |= closed_form(self.evidence, tensors)
        if repair == "rescale":
            tensors |= rescaled(self.evidence, tensors)
        network = build(self.evidence.parents, self.plan, self.drawing, tensors)
        if repair == "proxies":
            return reestimated(network, self.evidence)
        return network

    @property
    def heads(self) -> frozenset[str]:
        """Tensors of heads that stand side by side; none where the parents share their labels."""
        parents = self.evidence.parents
        if parents.settings.heads == "shared":
            return frozenset()
        return frozenset(name for name in self.averaged if touches_output(parents.symmetry, name))


def in_order(evidence: Evidence, order: Order) -> Evidence:
    """The evidence with its parents' units as they come ("none"), as the recipe matched them, or matched anew."""
    parents = evidence.parents
    if order == "recipe":
        return evidence
    if order == "none":
        return replace(evidence, alignments=(identity(parents.symmetry),) * parents.count)
    how = "weight" if order == "weights" else "activation"
    if how == parents.settings.matching:
        return evidence
    chosen = replace(parents, settings=replace(parents.settings, matching=how))
    return replace(evidence, alignments=match(chosen, evidence.statistics))


@dataclass(frozen=True)
class OneSize(Comparator):
    """A comparator that merges tensors unit by unit.

    repair: of units that lost variance by averaging: batch norms re-estimated on the "proxies", or in "closed" form
            from the statistics; "rescale" re-estimates them and rescales the units of layers without one; "none"
    """

    ranges: ClassVar[Ranges] = {}  # field -> lowest and highest value
    repair: Repair = "proxies"

    def __post_init__(self) -> None:
        check_choice("repair", self.repair, get_args(Repair))
        for name, (low, high) in self.ranges.items():
            check_range(name, getattr(self, name), low, high)

    def __call__(self, case: Case) -> nn.Module:
        canvas = Canvas.of(self.align(case))
        return canvas.network(self.merge(canvas, case), self.repair)

    def align(self, case: Case) -> Evidence:
        """The parents in the order in which their units are merged."""
        return case.evidence

    @abstractmethod
    def merge(self, canvas: Canvas, case: Case) -> State:
        """Tensors of the merged network under the names of the graph; those that are left out are averaged."""


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} = {value!r}: must be one of {', '.join(choices)}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InputError(f"{name} = {value:g}: must lie between {low:g} and {high:g}")
