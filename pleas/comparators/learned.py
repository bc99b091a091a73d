"""Coefficients, masks and directions of task vectors that are learnt on the proxies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pleas.comparators.comparator import Need, State
from pleas.comparators.one_size import Ranges, check_range
from pleas.comparators.vectors import FromBase, Tasks, total
from pleas.statistics.collect import for_each
from pleas.symmetry import execute


@dataclass(frozen=True)
class AdaMerging(FromBase):
    """A coefficient for every tensor of every task vector, of least entropy (AdaMerging, arXiv 2310.02575).

    Published on unlabelled test images; here on the proxies. With separate heads every head sees all of them.

    start:       of every coefficient
    steps, rate: of Adam; the rate of FusionBench, and for time half of its 1,000 steps
    batch:       proxies of a step
    """

    title: ClassVar[str] = "AdaMerging"
    needs: ClassVar[frozenset[Need]] = frozenset({"base", "images", "gradients"})
    start: float = 0.3
    steps: int = 500
    rate: float = 1e-3
    batch: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("start", self.start, 0, 10)
        check_steps(self.steps, self.rate, self.batch)

    def combine(self, tasks: Tasks) -> State:
        names = list(tasks.base)
        factors = torch.full((len(tasks.vectors), len(names)), self.start, dtype=torch.float64)

        def merged() -> dict[str, Tensor]:
            return {
                name: sum_of(factors[:, place], [vector[name] for vector in tasks.vectors])
                for place, name in enumerate(names)
            }

        with torch.enable_grad():
            factors.requires_grad_()
            optimiser = torch.optim.Adam([factors], lr=self.rate)
            for images in draw_batches(tasks, self.batch, self.steps):
                loss = sum(entropy(logits) for logits in answers(tasks, merged(), images))
                optimiser.zero_grad()
                loss.backward()  # type: ignore[union-attr]
                optimiser.step()
        with torch.no_grad():
            return merged()


@dataclass(frozen=True)
class ConcreteMask(FromBase):
    """Task arithmetic behind one mask for all tasks, of least entropy (Concrete subspaces, arXiv 2312.06173).

    The mask is drawn from a Concrete distribution while it is learnt, divided by its mean, and its expectation is kept.

    scale:       of the sum of task vectors
    temperature: of the Concrete distribution
    steps, rate: of Adam; the rate of FusionBench, and for time half of its 1,000 steps
    batch:       proxies of a step
    """

    title: ClassVar[str] = "Concrete TA"
    needs: ClassVar[frozenset[Need]] = frozenset({"base", "images", "gradients"})
    scale: float = 0.3
    temperature: float = 0.5
    steps: int = 500
    rate: float = 1e-3
    batch: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("scale", self.scale, 0, 10)
        check_range("temperature", self.temperature, 1e-3, 100)
        check_steps(self.steps, self.rate, self.batch)

    def combine(self, tasks: Tasks) -> State:
        summed = total(tasks.vectors, self.scale)
        logits = {name: torch.zeros_like(value) for name, value in summed.items()}
        generator = torch.Generator().manual_seed(tasks.case.seed)
        with torch.enable_grad():
            for value in logits.values():
                value.requires_grad_()
            optimiser = torch.optim.Adam(logits.values(), lr=self.rate)
            for images in draw_batches(tasks, self.batch, self.steps):
                mask = {name: concrete(value, self.temperature, generator) for name, value in logits.items()}
                loss = sum(entropy(answer) for answer in answers(tasks, masked(summed, mask), images))
                optimiser.zero_grad()
                loss.backward()  # type: ignore[union-attr]
                optimiser.step()
        with torch.no_grad():
            return masked(summed, {name: value.sigmoid() for name, value in logits.items()})


def concrete(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A relaxed draw of 0 and 1: sigmoid((log u - log(1 - u) + logits) / temperature), u uniform."""
    uniform = torch.rand(logits.shape, generator=generator, dtype=logits.dtype).clamp(1e-6, 1 - 1e-6)
    return ((uniform.log() - (-uniform).log1p() + logits) / temperature).sigmoid()


def masked(vector: State, mask: State) -> dict[str, Tensor]:
    """A task vector times a mask whose mean over all entries is made one."""
    mean = torch.cat([value.flatten() for value in mask.values()]).mean()
    return {name: value * mask[name] / mean for name, value in vector.items()}


@dataclass(frozen=True)
class FwMerging(FromBase):
    """From task arithmetic, steps towards the parent that lowers the loss most (FW-Merging, arXiv 2503.12649).

    The loss is published as cross-entropy on labelled training images; here on the proxies with each parent's own
    answers as labels. A step goes towards the parent, or the start, whose weights have the least sum over tensors of
    cosines with the gradient.

    scale: of the sum of task vectors at the start, and of every step    step: of the published 2 / (k + 2)
    rounds: steps, as published                                          images: proxies of a gradient
    """

    title: ClassVar[str] = "FW-Merging"
    needs: ClassVar[frozenset[Need]] = frozenset({"base", "images", "gradients"})
    ranges: ClassVar[Ranges] = {"scale": (0, 10), "step": (0, 10), "rounds": (0, 10**6), "images": (1, 10**6)}
    scale: float = 0.3
    step: float = 0.1
    rounds: int = 10
    images: int = 100

    def combine(self, tasks: Tasks) -> State:
        merged = total(tasks.vectors, self.scale)
        corners = [*tasks.vectors, dict(merged)]
        for number, images in enumerate(draw_batches(tasks, self.images, self.rounds)):
            gradient = self._gradient(tasks, merged, images)
            towards = min(corners, key=lambda corner: alignment(gradient, tasks.base, corner))
            length = 2 / (number + 2) * self.step * self.scale
            merged = {name: value + length * (towards[name] - value) for name, value in merged.items()}
        return merged

    def _gradient(self, tasks: Tasks, merged: State, images: list[Tensor]) -> dict[str, Tensor]:
        leaves = {name: value.clone().requires_grad_() for name, value in merged.items()}
        parents = tasks.canvas.evidence.parents
        own = [
            parent_answers(tasks, p, images[p]).argmax(-1) for p in range(parents.count)
        ]  # before the graph of the merged network is built
        with torch.enable_grad():
            found = answers(tasks, leaves, images)
            pairs = zip(found, own, strict=True) if len(found) == len(own) else [(found[0], y) for y in own]
            losses = [torch.nn.functional.cross_entropy(logits, labels) for logits, labels in pairs]
            grads = torch.autograd.grad(sum(losses) / len(losses), list(leaves.values()), allow_unused=True)  # type: ignore[arg-type]
        return {
            name: torch.zeros_like(leaves[name]) if grad is None else grad
            for name, grad in zip(leaves, grads, strict=True)
        }


def alignment(gradient: State, base: State, vector: State) -> float:
    """Sum over tensors of the cosine between the gradient and the weights `base + vector`."""
    found = 0.0
    for name, grad in gradient.items():
        weights = base[name] + vector[name]
        norms = float(grad.norm() * weights.norm())
        found += float((grad * weights).sum()) / norms if norms > 0 else 0.0
    return found


# what all of them share -------------------------------------------------------------------------------------


def check_steps(steps: int, rate: float, batch: int) -> None:
    check_range("steps", steps, 0, 10**6)
    check_range("rate", rate, 0, 10)
    check_range("batch", batch, 1, 10**6)


def sum_of(factors: Tensor, tensors: list[Tensor]) -> Tensor:
    return torch.stack([factor * value for factor, value in zip(factors, tensors, strict=True)]).sum(0)


def entropy(logits: Tensor) -> Tensor:
    """Mean over images of the entropy of the predictions."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


def draw_batches(tasks: Tasks, size: int, count: int) -> Iterator[list[Tensor]]:
    """So many batches, as every parent takes them, over and over in the order of the proxies."""
    parents, given = tasks.canvas.evidence.parents, 0
    while given < count:
        for batch in tasks.case.images:
            parts = [images.split(size) for images in for_each(batch, parents)]
            for part in zip(*parts, strict=True):
                if given == count:
                    return
                yield list(part)
                given += 1


def answers(tasks: Tasks, vector: State, images: list[Tensor]) -> list[Tensor]:
    """Logits of the network `base + vector`; with separate heads one set for each parent, from its own head.

    images: as every parent takes them; where labels are shared the network takes their mean
    """
    heads = tasks.canvas.heads
    body = {name: tasks.base[name] + value for name, value in vector.items()}
    if not heads:
        mean = images[0] if all(x is images[0] for x in images) else torch.stack(images).mean(0)
        return [run(tasks, {**tasks.canvas.averaged, **body}, mean)]
    found = []
    for own, seen in zip(tasks.canvas.evidence.states, images, strict=True):
        head = {name: own[name] for name in heads}
        found.append(run(tasks, {**tasks.canvas.averaged, **body, **head}, seen))
    return found


def parent_answers(tasks: Tasks, parent: int, images: Tensor) -> Tensor:
    """Logits of one parent."""
    with torch.no_grad():
        return run(tasks, tasks.canvas.evidence.states[parent], images)


def run(tasks: Tasks, state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Logits of the architecture with these tensors, which keep their gradients."""
    graph = tasks.canvas.evidence.parents.symmetry.program.graph
    placed = {
        name: value.to(images.device, images.dtype if value.is_floating_point() else None)
        for name, value in state.items()
    }
    return execute(graph, [placed], [images])[0]
