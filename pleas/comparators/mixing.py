"""Units that are mixed linearly instead of permuted: every parent's tensors in the units of the merged network.

A merged unit is a weighted mean of the parents' units, and what a parent's layer reads of it is another mixture. Both
are matrices (merged units, own units) for every class of units and parent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pleas.comparators.comparator import State
from pleas.network.average import contracted
from pleas.parents import Parents
from pleas.statistics.collect import Statistics
from pleas.symmetry import Axis, Symmetry

Mixtures = Mapping[int, Tensor]  # class -> (merged units, own units) float64


def not_mixable(parents: Parents) -> str | None:
    """Why units of this architecture can be permuted but not mixed, None where they can be mixed."""
    symmetry = parents.symmetry
    for index, unit_class in enumerate(symmetry.classes):
        if index not in symmetry.output and (unit_class.children or unit_class.kind == "head"):
            return (
                f"units of class {index} hold units of their own (heads, groups of channels), which can be permuted "
                "but not mixed"
            )
    layers = {layer.weight for layer in parents.layers}
    added = set(symmetry.program.added)
    for name in sorted(contracted(symmetry.program) - layers - added):
        if len(symmetry.shapes[name]) > 1 and bool((symmetry.axis(name, 0).cls >= 0).any()):
            return f"'{name}' is multiplied otherwise than by a plain layer, where units can be permuted but not mixed"
    return None


def mixed_state(parents: Parents, state: State, gives: Mixtures, reads: Mixtures) -> dict[str, Tensor]:
    """One parent's tensors in merged units, float64 on the CPU.

    gives: of the units that a tensor belongs to (rows of weights, biases, norms)    reads: of a weight's inputs
    """
    program, places = parents.symmetry.program, Places(parents.symmetry)
    weights = contracted(program)
    found: dict[str, Tensor] = {}
    for name in (*program.parameters, *program.buffers, *program.added):
        value = state[name]
        if not value.is_floating_point():
            found[name] = value
            continue
        value = value.double().cpu()
        weight = name in weights and value.dim() > 1
        for dim in range(value.dim()):
            value = along(value, dim, places.matrix(name, dim, reads if weight and dim else gives))
        found[name] = value
    return found


def along(value: Tensor, dim: int, matrix: Tensor | None) -> Tensor:
    """A matrix (new, old) applied along one dimension; None leaves it."""
    if matrix is None:
        return value
    moved = value.movedim(dim, 0)
    return (matrix @ moved.reshape(len(moved), -1)).view(len(matrix), *moved.shape[1:]).movedim(0, dim)


class Places:
    """Where the classes of units stand on the axes of the tensors."""

    def __init__(self, symmetry: Symmetry) -> None:
        self.symmetry = symmetry
        self._on: dict[tuple[str, int], list[tuple[int, Axis]]] = {}
        for c in free_classes(symmetry):
            for axis in symmetry.classes[c].axes:
                self._on.setdefault((axis.tensor, axis.dim), []).append((c, axis))

    def on(self, name: str, dim: int) -> list[tuple[int, Axis]]:
        """The classes along one dimension of a tensor. A depthwise weight says by its row what it reads."""
        if dim == 1 and self.symmetry.groups.get(name, 1) > 1:
            return []
        return self._on.get((name, dim), [])

    def matrix(self, name: str, dim: int, mixtures: Mixtures) -> Tensor | None:
        """(size, size) float64 for one axis; positions in no mixed class stay. None where all stay."""
        found = [(axis, mixtures[c]) for c, axis in self.on(name, dim) if c in mixtures]
        if not found:
            return None
        matrix = torch.eye(self.symmetry.shapes[name][dim], dtype=torch.float64)
        for axis, mixture in found:
            for places in axis.index.T:
                matrix[places[:, None], places[None, :]] = mixture
        return matrix


def free_classes(symmetry: Symmetry) -> list[int]:
    """Classes whose units may be mixed: all but the outputs."""
    return [index for index in range(len(symmetry.classes)) if index not in symmetry.output]


def unit_covariances(
    symmetry: Symmetry, statistics: Statistics, parents: int, c: int
) -> Iterable[tuple[int, Tensor]]:
    """Per place where a class was observed: its dimension (1: read, 0: written), and the covariance of all parents'
    units side by side, (parents * units, parents * units), the mean over positions of a unit."""
    for axis in symmetry.classes[c].axes:
        moments = statistics.units.get((axis.tensor, axis.dim))
        if moments is None:
            continue
        blocks = moments.covariance[0].unflatten(0, (parents, -1)).unflatten(2, (parents, -1))
        found = torch.stack([blocks[:, places][:, :, :, places] for places in axis.index.T]).mean(0)
        yield axis.dim, found.flatten(2).flatten(0, 1)


def mean_correlation(symmetry: Symmetry, statistics: Statistics, parents: int, c: int) -> Tensor:
    """Correlation of all parents' units of a class, the mean over the layers that read or write it; constant units
    correlate with nothing. Of a class that nobody observed: zeros."""
    size = parents * symmetry.classes[c].size
    total, count = torch.zeros((size, size), dtype=torch.float64), 0
    for _, covariance in unit_covariances(symmetry, statistics, parents, c):
        variance = covariance.diagonal()
        alive = variance > 1e-12 * variance.max()
        scale = torch.where(alive, variance, 1).rsqrt() * alive
        total += scale[:, None] * covariance * scale
        count += 1
    return total / max(1, count)
