"""RegMean and RegMean++: every layer by regression on the parents' inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from pleas.comparators.comparator import Case, Need, State
from pleas.comparators.one_size import Canvas, OneSize, Ranges, in_order
from pleas.comparators.rows import (
    Grams,
    add_gram,
    collect_grams,
    rows_at,
    sampler_of,
    surest_parent,
    too_wide,
    whole,
)
from pleas.comparators.walk import Walk
from pleas.evidence import Evidence
from pleas.layers.layer import Layer, flatten_weight, unflatten_weight
from pleas.parents import Parents
from pleas.ridge import ridge_solve

RIDGE = (
    1e-6  # relative to the mean diagonal, towards the mean: what no input tells stays the mean of the parents
)


@dataclass(frozen=True)
class RegMean(OneSize):
    """W = (sum_p G_p)^-1 sum_p G_p W_p with the Gram matrices of the layers' inputs (RegMean, arXiv 2212.09849).

    Convolutions are unfolded into linear maps; biases and norms are averaged, as published.

    off_diagonal: what the Gram matrices' off-diagonal entries are multiplied by
    permute:      whether units are matched first, as the recipe matches them
    """

    title: ClassVar[str] = "RegMean"
    needs: ClassVar[frozenset[Need]] = frozenset({"images"})
    ranges: ClassVar[Ranges] = {"off_diagonal": (0, 1)}
    off_diagonal: float = 0.9
    permute: bool = True

    def align(self, case: Case) -> Evidence:
        return in_order(case.evidence, "recipe" if self.permute else "none")

    def obstacle(self, parents: Parents, *, base: bool = False) -> str | None:
        return super().obstacle(parents, base=base) or too_wide(parents)

    def merge(self, canvas: Canvas, case: Case) -> State:
        grams, states = collect_grams(canvas.evidence), canvas.evidence.states
        heads, merged = canvas.heads, {}
        for layer in canvas.evidence.parents.layers:
            if layer.weight not in heads:
                own = [gram[layer.name] for gram in grams]
                merged[layer.weight] = regress(
                    layer, own, [state[layer.weight] for state in states], self.off_diagonal
                )
        return merged


@dataclass(frozen=True)
class RegMeanPlusPlus(RegMean):
    """RegMean on the inputs that the merged network itself gives each layer, first to last (arXiv 2508.03121).

    With one set of proxies for all parents the Gram matrices would be one and the same, so each proxy counts for the
    parent that is surest of it. With `repair: proxies` batch norms are re-estimated on the way.
    """

    title: ClassVar[str] = "RegMean++"

    def merge(self, canvas: Canvas, case: Case) -> State:
        return _Regressions(canvas, self.off_diagonal, self.repair == "proxies").go()


def regress(layer: Layer, grams: Sequence[Tensor], weights: Sequence[Tensor], off_diagonal: float) -> Tensor:
    """The weight that minimises sum_p |X_p (W - W_p)^T|^2, from grams X_p^T X_p (groups, d_in, d_in) whose
    off-diagonals are scaled."""
    own = [flatten_weight(w.double().cpu()).unflatten(0, (layer.groups, -1)) for w in weights]
    scaled = [
        off_diagonal * g + (1 - off_diagonal) * torch.diag_embed(g.diagonal(dim1=1, dim2=2)) for g in grams
    ]
    cross = sum(w @ g for w, g in zip(own, scaled, strict=True))
    mean = torch.stack(own).mean(0)
    solved = ridge_solve(torch.stack(scaled).sum(0), cross, mean, RIDGE, layer.name)  # type: ignore[arg-type]
    return unflatten_weight(solved.flatten(0, 1), layer.kernel).to(weights[0].dtype)


class _Regressions(Walk):
    """Layers are solved when the walk comes to them."""

    def __init__(self, canvas: Canvas, off_diagonal: float, norms: bool) -> None:
        super().__init__(canvas.evidence, canvas.averaged, norms=norms)
        self.heads, self.off_diagonal, self.count = canvas.heads, off_diagonal, canvas.evidence.parents.count
        self.surest, self.sampler = surest_parent(canvas.evidence), sampler_of(canvas.evidence)
        self.first = {layer.nodes[0]: layer for layer in canvas.evidence.parents.layers}

    def reach(self, node: fx.Node, args: list[tuple[Any, ...]]) -> None:
        layer = self.first.get(node.name)
        if layer is not None and layer.weight not in self.heads:
            self.set(layer.weight, self._solve(layer, node, [arguments[0] for arguments in args]))

    def _solve(self, layer: Layer, node: fx.Node, inputs: list[Tensor]) -> Tensor:
        grams = [Grams() for _ in range(self.count)]
        for c, value in enumerate(inputs):
            images = len(self.chunks[c])
            rows, each = rows_at(layer, node, value, self.sampler, images, self.starts[c])
            surest = self.surest[self.starts[c] : self.starts[c + 1]].repeat_interleave(each).to(rows.device)
            for p, own in enumerate(grams):
                add_gram(own, layer, rows[:, surest == p])
        full = [whole(own)[layer.name] for own in grams]
        return regress(layer, full, [s[layer.weight] for s in self.evidence.states], self.off_diagonal)
