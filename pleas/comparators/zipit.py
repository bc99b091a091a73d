"""ZipIt!: units are merged across parents and within one, in groups of any size."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from pleas.comparators.comparator import Case, Comparator, Need
from pleas.comparators.mixing import free_classes, mean_correlation, mixed_state, not_mixable
from pleas.comparators.one_size import Canvas, Repair, check_choice, check_range
from pleas.evidence import Evidence
from pleas.network.average import average, contracted
from pleas.network.build import draw
from pleas.parents import Parents
from pleas.plan.cost import FlopModel
from pleas.plan.layout import ClassPlan
from pleas.plan.plan import Plan, make_plan


@dataclass(frozen=True)
class ZipIt(Comparator):
    """The most correlated units are averaged greedily, whichever parent they are of (ZipIt!, arXiv 2305.03053).

    With `zipped` below 1 the last layers stay apart (partial zipping), and the network costs more than one parent.

    alpha:  what a unit's correlations are multiplied by each time it was merged
    beta:   of the merges that each parent takes part in, the share that may be within it
    zipped: share of the classes of units that are merged, from the first layer on
    """

    title: ClassVar[str] = "ZipIt!"
    needs: ClassVar[frozenset[Need]] = frozenset({"statistics"})
    repair: Repair = "proxies"
    alpha: float = 0.3
    beta: float = 0.125
    zipped: float = 1.0

    def __post_init__(self) -> None:
        check_choice("repair", self.repair, ("none", "proxies"))
        check_range("alpha", self.alpha, 1e-6, 1)
        check_range("beta", self.beta, 0, 1)
        check_range("zipped", self.zipped, 0, 1)

    def obstacle(self, parents: Parents, *, base: bool = False) -> str | None:
        return super().obstacle(parents, base=base) or not_mixable(parents)

    def __call__(self, case: Case) -> nn.Module:
        evidence = case.evidence
        parents, symmetry = evidence.parents, evidence.parents.symmetry
        fused, plan = partial_plan(evidence, self.zipped)
        gives: list[dict[int, Tensor]] = [{} for _ in range(parents.count)]
        reads: list[dict[int, Tensor]] = [{} for _ in range(parents.count)]
        for c in fused:
            correlation = mean_correlation(symmetry, evidence.statistics, parents.count, c)
            groups = zip_units(correlation, parents.count, self.alpha, self.beta)
            means = parents.count * groups / groups.sum(1, keepdim=True)  # the layout divides by the parents
            for p, (own, mean) in enumerate(
                zip(groups.chunk(parents.count, 1), means.chunk(parents.count, 1), strict=True)
            ):
                reads[p][c], gives[p][c] = own, mean
        return merge_mixed(evidence, plan, gives, reads, self.repair)


def merge_mixed(
    evidence: Evidence,
    plan: Plan,
    gives: list[dict[int, Tensor]],
    reads: list[dict[int, Tensor]],
    repair: Repair,
) -> nn.Module:
    """The mean of the parents' tensors in merged units, built for a plan."""
    parents = evidence.parents
    states = [mixed_state(parents, s, g, r) for s, g, r in zip(parents.states, gives, reads, strict=True)]
    drawing, program = draw(parents, plan), parents.symmetry.program
    weights = contracted(program)
    merged = {
        name: average(name, states, parents.symmetry, drawing.layouts, weights)
        for name in (*program.parameters, *program.buffers, *program.added)
    }
    for layer in parents.layers:
        if layer.norm is not None:
            merged[layer.norm.var] = merged[layer.norm.var].clamp_min(0)
    return Canvas(evidence, plan, drawing, merged).network({}, repair)


def partial_plan(evidence: Evidence, zipped: float) -> tuple[list[int], Plan]:
    """The classes that are merged, the first ones of the graph, and the plan that keeps the others apart."""
    parents = evidence.parents
    plan = make_plan(evidence, apart=0.0)
    free = free_classes(parents.symmetry)
    model = FlopModel(parents.symmetry, parents.count)
    order = sorted(free, key=lambda c: (model.depth(c), c))
    kept = order[: round(zipped * len(order))]
    apart = [c for c in order if c not in kept and parents.symmetry.classes[c].widenable]
    if not apart:
        return free, plan
    alone = [1 << p for p in range(parents.count)]
    classes = dict(plan.classes)
    for c in apart:
        size = parents.symmetry.classes[c].size
        classes[c] = ClassPlan.of([alone] * size, parents.count)
    outputs = next((classes[c] for c in parents.symmetry.output if classes[c].parts), None)
    costs = FlopModel(parents.symmetry, parents.count, outputs)
    masks = {c: Counter(classes[c].masks.tolist()) for c in free}
    return [c for c in free if c not in apart], replace(plan, classes=classes, flops=costs.total(masks))


def zip_units(correlation: Tensor, parents: int, alpha: float, beta: float) -> Tensor:
    """Which units every merged unit stands for: (units, parents * units), 0 or 1 (section 4 and appendix of the paper).

    The pair with the highest correlation is merged until there are as many units as one parent has. A merged unit has
    with every other one the lower of both correlations, times alpha. Merges within a parent are allowed until its
    budget is spent: `beta` of the merges that there are for it.
    """
    total = len(correlation)
    size = total // parents
    similar = correlation.clone()
    similar.fill_diagonal_(-torch.inf)
    groups = torch.eye(total, dtype=torch.float64)
    owner = torch.arange(total) // size
    alive = torch.ones(total, dtype=torch.bool)
    budget = torch.full((parents,), int((total - size) // parents * beta + 1e-4))
    for p in range(parents):
        if budget[p] <= 0:
            _forbid(similar, owner == p)
    for _ in range(total - size):
        first, second = sorted(divmod(int(similar.argmax()), total))
        if (
            similar[first, second] == -torch.inf
        ):  # nothing may be merged any more: the first two that are left
            first, second = alive.nonzero()[:2, 0].tolist()
        groups[first] += groups[second]
        lower = alpha * torch.minimum(similar[first], similar[second])
        similar[first], similar[:, first] = lower, lower
        similar[first, first] = -torch.inf
        similar[second], similar[:, second] = -torch.inf, -torch.inf
        alive[second] = False
        p = int(owner[first])
        if owner[first] == owner[second]:
            budget[p] -= 1
            if budget[p] <= 0:
                _forbid(similar, owner == p)
    return groups[alive]


def _forbid(similar: Tensor, own: Tensor) -> None:
    """No more merges within the units of one parent."""
    similar[own[:, None] & own[None, :]] = -torch.inf
