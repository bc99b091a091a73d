"""Editing the parents' graph for a plan: widths that are written into shape constants, and layers in
blocks."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from pleas.errors import UnsupportedModel
from pleas.layers.layer import Layer
from pleas.plan.layout import ClassPlan, Layout, lay_out, plain_layout
from pleas.symmetry import Symmetry

aten = torch.ops.aten


class Layouts:
    """The layout of every axis of every tensor and value of a traced model under a plan."""

    def __init__(self, symmetry: Symmetry, plans: Mapping[int, ClassPlan], parents: int) -> None:
        self.symmetry, self.plans, self.parents = symmetry, plans, parents
        self._axes: dict[tuple[str, int], Layout] = {}
        self._values: dict[tuple[str, int], Layout] = {}

    def axis(self, tensor: str, dim: int) -> Layout:
        """Layout of a parameter's or buffer's axis (dim 1 of a grouped weight: the virtual axis over all
        channels)."""
        key = (tensor, dim)
        if key not in self._axes:
            self._axes[key] = lay_out(self.symmetry.axis(tensor, dim), self.plans, self.parents)
        return self._axes[key]

    def value(self, node: fx.Node, dim: int) -> Layout:
        """Layout of one dimension of an activation."""
        value = node.meta["val"]
        dim = dim % value.dim()
        key = (node.name, dim)
        if key not in self._values:
            units, size = self.symmetry.value(node.name, dim), value.shape[dim]
            self._values[key] = (
                plain_layout(size if isinstance(size, int) else 1, self.parents)
                if units is None
                else lay_out(units, self.plans, self.parents)
            )
        return self._values[key]

    def widened(self, node: fx.Node) -> dict[int, Layout]:
        """The dimensions of an activation (of the first, where an op gives several) that are not the parents' own."""
        value = node.meta["val"]
        value = value[0] if isinstance(value, tuple | list) else value
        if not isinstance(value, torch.Tensor):
            return {}
        found = {dim: self._value_of(node, value, dim) for dim in range(value.dim())}
        return {dim: layout for dim, layout in found.items() if not layout.plain}

    def _value_of(self, node: fx.Node, value: torch.Tensor, dim: int) -> Layout:
        if value is node.meta["val"]:
            return self.value(node, dim)
        first = next(user for user in node.users if user.target is operator.getitem and user.args[1] == 0)
        return self.value(first, dim)


def edit_graph(
    symmetry: Symmetry, layouts: Layouts, layers: tuple[Layer, ...], split: set[str]
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """The parents' graph with the plan's widths: shape constants rewritten, nodes of the layers named in
    `split` turned into calls of their block module (named as the layer). And which node became which."""
    by_node = {node: layer for layer in layers for node in layer.nodes if layer.name in split}
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in symmetry.program.graph.nodes:
        if node.name in by_node:
            env[node] = graph.call_module(by_node[node.name].name, (env[node.args[0]],))
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
            if node.target in (aten.view.default, aten._unsafe_view.default):
                env[
                    node
                ].target = aten.reshape.default  # a block layer may hand on other strides than the parents'
            edit = EDITS.get(node.target)
            if edit is not None:
                args = edit(node, layouts, list(env[node].args))
                env[node].args = tuple(args)
                if node.target is aten.split.Tensor and isinstance(args[1], list):
                    env[node].target = aten.split_with_sizes.default
    for node in reversed(graph.nodes):  # weights that moved into block modules
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    graph.lint()
    return graph, env


def _sizes(position: int) -> Callable[[fx.Node, Layouts, list[Any]], list[Any]]:
    """Ops whose argument `position` is the list of output sizes."""

    def edit(node: fx.Node, layouts: Layouts, args: list[Any]) -> list[Any]:
        sizes = list(args[position])
        for dim, size in enumerate(sizes):
            if isinstance(size, int) and size != -1:
                layout = layouts.value(node, dim)
                if layout.widened:
                    sizes[dim] = layout.size
        args[position] = sizes
        return args

    return edit


def _view(node: fx.Node, layouts: Layouts, args: list[Any]) -> list[Any]:
    """Every known size is written down and the one that depends on the batch is inferred: it may be a multiple of a
    widened dimension, as where the heads of attention are laid along the batch."""
    sizes = _sizes(1)(node, layouts, args)[1]
    shape = node.meta["val"].shape
    for dim, size in enumerate(sizes):
        if size == -1 and isinstance(shape[dim], int):
            sizes[dim] = layouts.value(node, dim).size
    of_the_batch = [dim for dim, size in enumerate(shape) if not isinstance(size, int)]
    if len(of_the_batch) == 1:
        sizes[of_the_batch[0]] = -1
    return [args[0], sizes, *args[2:]]


def _slice(node: fx.Node, layouts: Layouts, args: list[Any]) -> list[Any]:
    source = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else 0
    layout = layouts.value(source, dim)  # type: ignore[arg-type]
    if not layout.widened:
        return args
    step = node.args[4] if len(node.args) > 4 else 1
    if step != 1:
        raise _refuse(node, f"takes every {step}th unit of a widened dimension")
    begin = node.args[2] if len(node.args) > 2 and node.args[2] is not None else 0
    end = node.args[3] if len(node.args) > 3 and node.args[3] is not None else layout.old
    return [*args[:1], dim, _bound(node, layout, begin), _bound(node, layout, end)]


def _split(node: fx.Node, layouts: Layouts, args: list[Any]) -> list[Any]:
    dim = node.args[2] if len(node.args) > 2 else 0
    layout = layouts.value(node.args[0], dim)  # type: ignore[arg-type]
    if not layout.widened:
        return args
    sizes: Any = args[1]
    if isinstance(sizes, int):
        sizes = [min(sizes, layout.old - i) for i in range(0, layout.old, sizes)]
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    starts = [_bound(node, layout, bound) for bound in bounds]
    return [args[0], [y - x for x, y in itertools.pairwise(starts)], dim]


def _bound(node: fx.Node, layout: Layout, position: Any) -> int:
    """Where an old boundary lies on the widened axis."""
    if not isinstance(position, int):
        raise _refuse(node, "has a boundary that depends on the input")
    position = min(position + layout.old if position < 0 else position, layout.old)
    if position < layout.old and bool(layout.split[position]):
        raise _refuse(node, f"cuts through a widened unit at position {position}")
    return int(layout.start[position])


def _select(node: fx.Node, layouts: Layouts, args: list[Any]) -> list[Any]:
    layout = layouts.value(node.args[0], node.args[1])  # type: ignore[arg-type]
    if not layout.widened:
        return args
    position = node.args[2]
    if int(layout.start[position + 1] - layout.start[position]) != 1:  # type: ignore[operator]
        raise _refuse(node, f"selects position {position}, which holds two merged units")
    return [*args[:2], int(layout.start[position])]  # type: ignore[index]


def _convolution(node: fx.Node, layouts: Layouts, args: list[Any]) -> list[Any]:
    """A convolution that is not a layer (its weight is computed): its groups still follow the widths."""
    groups = args[8]
    layout = layouts.value(node.args[0], 1)  # type: ignore[arg-type]
    if groups > 1 and layout.widened:
        args[8] = groups * layout.size // layout.old
    return args


def _group_norm(node: fx.Node, layouts: Layouts, args: list[Any]) -> list[Any]:
    layout = layouts.value(node.args[0], 1)  # type: ignore[arg-type]
    if layout.widened:
        args[4] = layout.size
        args[6] = args[6] * layout.size // layout.old
    return args


def _layer_norm(node: fx.Node, layouts: Layouts, args: list[Any]) -> list[Any]:
    dims = len(args[1])
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    if any(layouts.value(node.args[0], value.dim() - 1 - i).widened for i in range(dims)):  # type: ignore[arg-type]
        raise _refuse(node, "normalises over a widened dimension")
    return args


def _refuse(node: fx.Node, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"node '{node.name}' ({node.target}) {why}: this model cannot be widened there. Use budget 1.0."
    )


EDITS: dict[Any, Callable[[fx.Node, Layouts, list[Any]], list[Any]]] = {
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.expand.default: _sizes(1),
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.select.int: _select,
    aten.convolution.default: _convolution,
    aten.native_group_norm.default: _group_norm,
    aten.native_layer_norm.default: _layer_norm,
}
