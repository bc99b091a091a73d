"""What methods of a common base share: a parent is the base and its task vector, and the vectors are what is merged.

Units stay as they come: siblings of one base are in one order. Only learnt tensors have task vectors. Statistics of
batch norms are the mean of the parents' (then repaired as the method's `repair` says), and so are tensors that the base
has in another shape, such as a head of other classes; counters and other whole numbers are the first parent's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pleas.comparators.comparator import Case, Need, State
from pleas.comparators.one_size import Canvas, OneSize, in_order
from pleas.errors import InputError
from pleas.evidence import Evidence

Vectors = Sequence[State]  # one task vector for each parent: name -> tensor


@dataclass(frozen=True)
class Tasks:
    """The base's learnt tensors, and every parent less them; float64 on the CPU, under the names of the graph.

    depth: of each tensor's layer, 0 for the first in order of use to 1 for the last
    """

    base: State
    vectors: Vectors
    depth: Mapping[str, float]
    canvas: Canvas
    case: Case

    @classmethod
    def of(cls, canvas: Canvas, case: Case) -> Tasks:
        """Raises InputError where there is no base, or nothing that it shares with the parents."""
        if case.base is None:
            raise InputError("methods of task vectors need the network that all parents were fine-tuned from")
        states = canvas.evidence.states
        names = [
            name
            for name in canvas.evidence.parents.symmetry.program.parameters
            if name not in canvas.heads and states[0][name].is_floating_point()
            if all(state[name].shape == case.base[name].shape for state in states)
        ]
        if not names:
            raise InputError("the base shares no tensor with the parents: it has no task vectors")
        base = {name: _exact(case.base[name]) for name in names}
        vectors = [{name: _exact(state[name]) - base[name] for name in names} for state in states]
        return cls(base, vectors, depths(names), canvas, case)


@dataclass(frozen=True)
class FromBase(OneSize):
    """A method that merges task vectors into one, which is added to the base."""

    needs: ClassVar[frozenset[Need]] = frozenset({"base"})

    def align(self, case: Case) -> Evidence:
        return in_order(case.evidence, "none")

    def merge(self, canvas: Canvas, case: Case) -> State:
        tasks = Tasks.of(canvas, case)
        return {name: tasks.base[name] + value for name, value in self.combine(tasks).items()}

    @abstractmethod
    def combine(self, tasks: Tasks) -> State:
        """The merged task vector; its tensors that are left out are averaged over the parents."""


def depths(names: Sequence[str]) -> dict[str, float]:
    """Tensors of one module are one layer; layers count equally, in the order given."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    last = max(len(layers) - 1, 1)
    return {name: layers.index(name.rpartition(".")[0]) / last for name in names}


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def each(vectors: Vectors, merge: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Merge tensor by tensor: `merge` takes (parents, *shape) and gives (*shape)."""
    return {name: merge(torch.stack([vector[name] for vector in vectors])) for name in vectors[0]}


def whole(vectors: Vectors, merge: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Merge all tensors as one: `merge` takes (parents, entries) and gives (entries,)."""
    flat = torch.stack([torch.cat([value.flatten() for value in vector.values()]) for vector in vectors])
    parts = merge(flat).split([value.numel() for value in vectors[0].values()])
    return {name: part.view_as(value) for part, (name, value) in zip(parts, vectors[0].items(), strict=True)}


def total(vectors: Vectors, scale: float = 1.0) -> dict[str, Tensor]:
    """The scaled sum of task vectors."""
    return each(vectors, lambda values: scale * values.sum(0))


def largest(values: Tensor, share: float) -> Tensor:
    """Which entries of every row of (n, d) are among the largest `share` by magnitude.

    As published code has it: at least as large as the (d - floor(share d))-th smallest, so that one more is kept and
    ties are kept together.
    """
    size = values.shape[1]
    place = size - int(size * share)
    if place < 1:
        return torch.ones_like(values, dtype=torch.bool)
    sizes = values.abs()
    return sizes >= sizes.kthvalue(place, dim=1, keepdim=True).values
