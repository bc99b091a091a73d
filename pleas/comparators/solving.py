"""Every layer by least squares at one parent's size: as PLeaS was published, and by neuron interpolation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pleas.comparators.comparator import Case, Comparator, Need, State
from pleas.comparators.one_size import Canvas, OneSize, Ranges
from pleas.evidence import Evidence
from pleas.layers.layer import Layer
from pleas.matching.assign import AxisName
from pleas.matching.match import ActivationPairs, common_order
from pleas.network.build import build
from pleas.parents import Parents
from pleas.solve.propagate import propagate
from pleas.statistics.collect import Statistics, for_each, placed
from pleas.symmetry import execute

RIDGE = 1e-6  # what a pseudo-inverse would be, without its jumps


@dataclass(frozen=True)
class PublishedPLeaS(OneSize):
    """Matched weights, each layer then fitted to the parents' mean output on their mean input (arXiv 2407.02447).

    By Adam on all layers at once, as published, instead of in closed form; nothing is solved on what the merged network
    itself feeds its layers. At one parent's size.

    steps: batches    batch: images of each    rate: of Adam, falling by a cosine to zero
    """

    title: ClassVar[str] = "PLeaS as published"
    needs: ClassVar[frozenset[Need]] = frozenset({"matching", "images", "gradients"})
    ranges: ClassVar[Ranges] = {"steps": (1, 10**6), "batch": (1, 10**6), "rate": (1e-9, 1e3)}
    steps: int = 400
    batch: int = 32
    rate: float = 5e-4

    def merge(self, canvas: Canvas, case: Case) -> State:
        evidence = canvas.evidence
        layers = [layer for layer in evidence.parents.layers if layer.weight not in canvas.heads]
        names = [name for layer in layers for name in (layer.weight, layer.bias) if name]
        where = next(_batches(evidence, self.batch))[0].device
        fitted = {name: canvas.averaged[name].to(where).requires_grad_(True) for name in names}
        adam = torch.optim.Adam(list(fitted.values()), lr=self.rate)
        states = placed(evidence.states, next(_batches(evidence, self.batch))[0])
        batches = itertools.chain.from_iterable(_batches(evidence, self.batch) for _ in itertools.count())
        for step, each in enumerate(itertools.islice(batches, self.steps)):
            adam.param_groups[0]["lr"] = self.rate * (1 + math.cos(math.pi * step / self.steps)) / 2
            adam.zero_grad()
            _add_gradients(evidence, layers, states, fitted, each)
            adam.step()
        return {name: value.detach().cpu() for name, value in fitted.items()}


def _batches(evidence: Evidence, size: int) -> Iterator[list[Tensor]]:
    for batch in evidence.inputs:
        each = for_each(batch, evidence.parents)
        yield from (list(parts) for parts in zip(*(x.split(size) for x in each), strict=True))


def _add_gradients(
    evidence: Evidence,
    layers: list[Layer],
    states: list[dict[str, Tensor]],
    fitted: State,
    each: list[Tensor],
) -> None:
    """Of the sum over layers of the mean squared error between what a layer makes of the parents' mean input and their
    mean output, batch norm left out."""
    owner = {name: layer for layer in layers for name in layer.nodes}
    inputs: dict[str, tuple[Any, ...]] = {}

    def before(node: fx.Node, args: list[tuple[Any, ...]], _: Any) -> None:
        if node.name in owner:
            mean = torch.stack([arguments[0] for arguments in args]).mean(0)
            inputs[node.name] = (mean, *args[0][1:])

    def after(node: fx.Node, values: list[Any]) -> None:
        layer = owner.get(node.name)
        if layer is None:
            return
        mean, _, *rest = inputs.pop(node.name)
        if layer.bias is not None:
            rest[0] = fitted[layer.bias]
        with torch.enable_grad():
            found = node.target(mean, fitted[layer.weight], *rest)  # type: ignore[operator]
            F.mse_loss(found, torch.stack(values).mean(0)).backward()

    with torch.no_grad():
        execute(evidence.parents.symmetry.program.graph, states, each, before, after)


@dataclass(frozen=True)
class NeuronInterpolation(Comparator):
    """Nearest units are averaged and each layer is fitted to them on the merged network's inputs (arXiv 2507.00037).

    The closed form for linear layers and convolutions (Hungarian fusion) with neurons that all count alike: units are
    matched by the mean squared distance of their activations, the targets are the means of matched ones, and layers are
    solved first to last. Sums with other branches are put right as in our own merge, which the paper does not do.
    """

    title: ClassVar[str] = "neuron interpolation"
    needs: ClassVar[frozenset[Need]] = frozenset({"statistics", "images"})

    def __call__(self, case: Case) -> nn.Module:
        settings = replace(case.evidence.parents.settings, ridge=RIDGE, head_ridge=RIDGE, min_rows=0.0)
        parents = replace(case.evidence.parents, settings=settings)
        alignments = common_order(parents, near_pairs(parents, case.evidence.statistics))
        canvas = Canvas.of(replace(case.evidence, parents=parents, alignments=alignments))
        (solved,) = propagate(canvas.evidence, canvas.drawing, [1.0])
        return build(parents, canvas.plan, canvas.drawing, solved.state)


def near_pairs(parents: Parents, statistics: Statistics) -> ActivationPairs:
    """Assignments by the mean squared distance of two units' activations, relative to their mean variance."""
    blocks: dict[tuple[int, int], dict[AxisName, Tensor]] = {
        pair: {} for pair in itertools.combinations(range(parents.count), 2)
    }
    for axis, moments in statistics.units.items():
        covariance = moments.covariance[0].unflatten(0, (parents.count, -1)).unflatten(2, (parents.count, -1))
        mean = moments.mean[0].unflatten(0, (parents.count, -1))
        for (p, q), found in blocks.items():
            variances = covariance[p, :, p].diagonal()[:, None] + covariance[q, :, q].diagonal()[None]
            apart = variances - 2 * covariance[p, :, q] + (mean[p][:, None] - mean[q][None]).square()
            found[axis] = -apart / variances.mean().clamp_min(torch.finfo(torch.float64).tiny)
    return ActivationPairs(parents.symmetry, blocks)
