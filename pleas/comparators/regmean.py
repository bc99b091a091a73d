"""RegMean and RegMean++: every layer by regression on the parents' inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from pleas.comparators.comparator import Case, Need, State
from pleas.comparators.one_size import Canvas, OneSize, check_range, in_order
from pleas.comparators.repair import merged_inputs
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
from pleas.evidence import Evidence
from pleas.layers.layer import BATCH_NORM, Layer, batch_norm, flatten_weight, unflatten_weight
from pleas.parents import Parents
from pleas.ridge import ridge_solve
from pleas.symmetry import execute

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
    off_diagonal: float = 0.9
    permute: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("off_diagonal", self.off_diagonal, 0, 1)

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
        return _Walk(canvas, self.off_diagonal, self.repair == "proxies").go()


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


class _Walk:
    """One walk of the merged network through the graph, all images at every node."""

    def __init__(self, canvas: Canvas, off_diagonal: float, norms: bool) -> None:
        evidence = canvas.evidence
        self.evidence, self.heads, self.off_diagonal, self.norms = evidence, canvas.heads, off_diagonal, norms
        self.count = evidence.parents.count
        self.surest, self.sampler = surest_parent(evidence), sampler_of(evidence)
        self.first = {layer.nodes[0]: layer for layer in evidence.parents.layers}
        self.chunks = list(merged_inputs(evidence))
        self.starts = [0]
        for chunk in self.chunks:
            self.starts.append(self.starts[-1] + len(chunk))
        constants = dict(evidence.parents.symmetry.program.constants)
        where = self.chunks[0].device
        mean = {**constants, **evidence.states[0], **_without(canvas.averaged, canvas.heads)}
        self.state = {name: value.to(where) for name, value in mean.items()}
        self.merged: dict[str, Tensor] = {}

    def go(self) -> State:
        """Every batch runs as if it were a parent, in lock step; a layer is solved when the walk comes to it."""
        graph = self.evidence.parents.symmetry.program.graph
        with torch.no_grad():
            execute(graph, [self.state] * len(self.chunks), self.chunks, self._reach)
        return self.merged

    def _reach(self, node: fx.Node, args: list[tuple[Any, ...]], _: list[dict[str, Any]]) -> None:
        layer = self.first.get(node.name)
        if layer is not None and layer.weight not in self.heads:
            self._set(layer.weight, self._solve(layer, node, [arguments[0] for arguments in args]))
        if node.target is BATCH_NORM and self.norms:
            norm = batch_norm(node)
            if norm is not None:
                values = torch.cat([arguments[0] for arguments in args])
                over = [dim for dim in range(values.dim()) if dim != 1]
                variance, mean = torch.var_mean(values, over)
                self._set(norm.mean, mean)
                self._set(norm.var, variance)
        # `execute` looked the tensors up before it asked: what was set now has to reach this node too.
        names = [x.target if isinstance(x, fx.Node) and x.op == "get_attr" else None for x in node.args]
        for number, arguments in enumerate(args):
            args[number] = tuple(
                self.state[str(name)] if name in self.merged else value
                for name, value in zip(names, arguments, strict=True)
            )

    def _set(self, name: str, value: Tensor) -> None:
        self.merged[name] = self.state[name] = value.to(self.state[name])

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


def _without(state: State, names: frozenset[str]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name not in names}
