"""Other ways of saying which unit is which: by two similarities at once, and by what the mean of weights computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from pleas.comparators.comparator import Case, Need, State
from pleas.comparators.one_size import Canvas, OneSize, Ranges
from pleas.evidence import Evidence
from pleas.layers.layer import BATCH_NORM
from pleas.matching.activations import activation_similarities
from pleas.matching.assign import AxisName, assign
from pleas.matching.match import Pairs, common_order, summed
from pleas.matching.weights import by_depth, match_weights, weight_similarities, with_class
from pleas.parents import Parents
from pleas.statistics.collect import Statistics, for_each, placed
from pleas.symmetry import Permutation, Symmetry, UnitClass, execute, identity, permute_state, position_maps

SWEEPS = 20


@dataclass(frozen=True)
class MuDSC(OneSize):
    """The mean of units matched by weights and activations at once (MuDSC, arXiv 2403.01753, its permutations).

    The similarity of two units is alpha times the correlation of their activations plus 1 - alpha times the cosine of
    their weights, each the mean over the layers that read or write the class; sweeps go on until nothing changes.
    """

    title: ClassVar[str] = "MuDSC"
    needs: ClassVar[frozenset[Need]] = frozenset({"statistics"})
    ranges: ClassVar[Ranges] = {"alpha": (0, 1)}
    alpha: float = 0.5

    def align(self, case: Case) -> Evidence:
        pairs = _MixedPairs(case.evidence.parents, case.evidence.statistics, self.alpha)
        return replace(case.evidence, alignments=common_order(case.evidence.parents, pairs))

    def merge(self, canvas: Canvas, case: Case) -> State:
        return {}


class _MixedPairs(Pairs):
    """Assignments from activations, which stay, and weights, which depend on what is matched already."""

    def __init__(self, parents: Parents, statistics: Statistics, alpha: float) -> None:
        self.symmetry, self.states, self.alpha = parents.symmetry, parents.states, alpha
        self.statistics, self.count = statistics, parents.count

    def assign(self, p: int, q: int) -> tuple[Permutation, float]:
        return self.reassign(q, {p: identity(self.symmetry)})

    def reassign(self, q: int, others: Mapping[int, Permutation]) -> tuple[Permutation, float]:
        aligned = [permute_state(self.symmetry, self.states[p], chosen) for p, chosen in others.items()]
        total = {name: summed([state[name] for state in aligned]) for name in aligned[0]}
        activations = self._activations(q, others)
        permutation, value = identity(self.symmetry), 0.0
        for _ in range(SWEEPS):
            before, value = permutation, 0.0
            for index in by_depth(self.symmetry):
                weights = weight_similarities(
                    self.symmetry, total, self.states[q], permutation, index, cosine=True
                )
                matrices = {axis: x for axis, x in weights.items() if total[axis[0]].dim() > 1}
                mixed = mean_similarities(
                    [(self.alpha, activations), (1 - self.alpha, matrices)], index, self.symmetry
                )
                best, found = assign(self.symmetry.classes[index], mixed)
                permutation, value = with_class(permutation, index, best), value + found
            if all(torch.equal(x.perm, y.perm) for x, y in zip(before, permutation, strict=True)):
                break
        return permutation, value

    def _activations(self, q: int, others: Mapping[int, Permutation]) -> dict[AxisName, Tensor]:
        total: dict[AxisName, Tensor] = {}
        for p, permutation in others.items():
            maps = position_maps(self.symmetry, permutation)
            for axis, block in activation_similarities(self.statistics, self.count, p, q).items():
                aligned = block.index_select(0, maps[axis]) if axis in maps else block
                total[axis] = total[axis] + aligned / len(others) if axis in total else aligned / len(others)
        return total


def mean_similarities(
    parts: Sequence[tuple[float, Mapping[AxisName, Tensor]]], index: int, symmetry: Symmetry
) -> dict[AxisName, Tensor]:
    """Weighted sums of similarities, each divided by the number of places where it knows the class."""
    touched = set(_axes(symmetry.classes[index]))
    mixed: dict[AxisName, Tensor] = {}
    for weight, similarities in parts:
        known = {axis: x for axis, x in similarities.items() if axis in touched}
        for axis, x in known.items():
            share = weight / len(known) * x.double().cpu()
            mixed[axis] = mixed[axis] + share if axis in mixed else share
    return mixed


def _axes(unit_class: UnitClass) -> Iterator[AxisName]:
    for axis in unit_class.axes:
        yield axis.tensor, axis.dim
    for unit in unit_class.children:
        for child in unit:
            yield from _axes(child)


@dataclass(frozen=True)
class StraightThrough(OneSize):
    """Units of the second parent matched so that the mean of both answers as they do (arXiv 2209.04836, alg. 2).

    Weights W follow the gradient at the mean of W_1 and P(W_2), P matching W_2 to W, as if P were not there; the best P
    that was seen is kept. The loss is the cross-entropy to the mean of the parents' predictions on the proxies, batch
    norms normalising by the batch at hand.

    steps: batches    rate: of Adam
    """

    title: ClassVar[str] = "straight-through"
    needs: ClassVar[frozenset[Need]] = frozenset({"images", "gradients", "shared labels"})
    most_parents: ClassVar[int | None] = 2
    ranges: ClassVar[Ranges] = {"steps": (1, 10**5), "rate": (1e-9, 1e3)}
    steps: int = 50
    rate: float = 1e-2

    def align(self, case: Case) -> Evidence:
        evidence = case.evidence
        symmetry, (first, second) = evidence.parents.symmetry, evidence.parents.states
        names = [name for name in symmetry.program.parameters if first[name].is_floating_point()]
        moving = {name: first[name].detach().clone().requires_grad_(True) for name in names}
        adam = torch.optim.Adam(list(moving.values()), lr=self.rate)
        best, least = identity(symmetry), float("inf")
        for batch in _cycled(evidence, self.steps):
            current = {**first, **{name: value.detach() for name, value in moving.items()}}
            permutation, _ = match_weights(symmetry, current, second)
            aligned = permute_state(symmetry, second, permutation)
            loss, gradients = _loss_at_mean(evidence, names, aligned, batch)
            if loss < least:
                best, least = permutation, loss
            for name, gradient in gradients.items():
                moving[name].grad = gradient.to(moving[name])
            adam.step()
        return replace(evidence, alignments=(identity(symmetry), best))

    def merge(self, canvas: Canvas, case: Case) -> State:
        return {}


def _cycled(evidence: Evidence, steps: int) -> Iterator[list[Tensor]]:
    """Batches as the parents take them, `steps` of them, the same ones again where there are fewer."""
    done = 0
    while done < steps:
        for batch in evidence.inputs:
            yield for_each(batch, evidence.parents)
            done += 1
            if done == steps:
                return


def _loss_at_mean(
    evidence: Evidence, names: list[str], aligned: State, batch: list[Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """Cross-entropy of the mean of the weights to the parents' mean prediction, and its gradient."""
    parents = evidence.parents
    graph = parents.symmetry.program.graph
    first = parents.states[0]
    where = batch[0].device
    with torch.no_grad():
        answers = execute(graph, placed(parents.states, batch[0]), batch)
        target = torch.stack([answer.softmax(-1) for answer in answers]).mean(0)
    mean = {name: value.to(where) for name, value in first.items()}
    for name in names:
        mean[name] = ((first[name] + aligned[name]) / 2).to(where).requires_grad_(True)

    def by_batch(node: fx.Node, args: list[tuple[Any, ...]], _: Any) -> None:
        if node.target is BATCH_NORM:
            x, weight, bias, *_rest, momentum, eps = args[0]
            over = [dim for dim in range(x.dim()) if dim != 1]
            variance, center = torch.var_mean(x, over, correction=0)
            shape = [1, -1] + [1] * (x.dim() - 2)
            normal = (x - center.view(shape)) / (variance + eps).sqrt().view(shape)
            zeros, ones = torch.zeros_like(center), torch.ones_like(variance) - eps
            args[0] = (normal, weight, bias, zeros, ones, momentum, eps)

    x = batch[0] if all(y is batch[0] for y in batch) else torch.stack(batch).mean(0)
    with torch.enable_grad():
        found = execute(graph, [mean], [x], by_batch)[0]
        loss = -(target * found.log_softmax(-1)).sum(-1).mean()
        gradients = torch.autograd.grad(loss, [mean[name] for name in names], allow_unused=True)
    known = {n: g for n, g in zip(names, gradients, strict=True) if g is not None}
    return float(loss.detach()), known
