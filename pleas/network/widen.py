"""Editing the parents' graph for a plan: widths that are written into shape constants, layers in blocks, and norms over
widened units."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from pleas.errors import UnsupportedModel
from pleas.layers.layer import Layer
from pleas.network.views import Constants, by_owner
from pleas.plan.layout import ClassPlan, Layout, lay_out, plain_layout
from pleas.symmetry import Symmetry
from pleas.symmetry.owners import GROUP_NORM, LAYER_NORM, reduced_dims

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
) -> tuple[fx.Graph, dict[fx.Node, fx.Node], dict[str, torch.Tensor]]:
    """The parents' graph with the plan's widths: shape constants rewritten, nodes of the layers named in `split` turned
    into calls of their block module (named as the layer), reductions over widened units taken owner by owner. And which
    node became which, and the constants that were added, by name."""
    program = symmetry.program
    by_node = {node: layer for layer in layers for node in layer.nodes if layer.name in split}
    graph, constants = fx.Graph(), Constants({*program.parameters, *program.buffers, *program.added})
    env: dict[fx.Node, fx.Node] = {}
    parted: set[fx.Node] = set()  # that gave a tuple, of which the first is left
    for node in program.graph.nodes:
        axis = reduced_axis(node, layouts)
        if node.name in by_node:
            env[node] = graph.call_module(by_node[node.name].name, (env[node.args[0]],))
        elif axis is not None:
            env[node] = _owner_by_owner(node, axis, graph, constants, env)
            if isinstance(node.meta["val"], tuple | list):
                parted.add(node)
        elif node.target is operator.getitem and node.args[0] in parted:
            if node.args[1] != 0:
                raise _refuse(node, "reads the statistics of a norm over widened units")
            env[node] = graph.call_function(aten.alias.default, (env[node.args[0]],))  # type: ignore[index]
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
            if node.target in (aten.view.default, aten._unsafe_view.default):
                # A block layer may hand on other strides than the parents'.
                env[node].target = aten.reshape.default
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
    return graph, env, constants.tensors


def reduced_axis(node: fx.Node, layouts: Layouts) -> tuple[int, Layout] | None:
    """The widened dimension, counted from the end, that a norm or another reduction runs over, and its layout."""
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if not isinstance(node.target, torch._ops.OpOverload) or source is None:
        return None
    value = source.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    dims = reduced_dims(node)
    found = [(d - value.dim(), layouts.value(source, d)) for d in dims if layouts.value(source, d).widened]
    if len(found) > 1:
        raise _refuse(node, "runs over two widened dimensions")
    return found[0] if found else None


def _owner_by_owner(
    node: fx.Node,
    axis: tuple[int, Layout],
    graph: fx.Graph,
    constants: Constants,
    env: Mapping[fx.Node, fx.Node],
) -> fx.Node:
    """Nodes that take a norm or a reduction of every parent's view, and the scale and shift of every unit."""
    args: list[Any] = list(map_arg(node.args, env.__getitem__))
    source, kwargs = args[0], map_arg(node.kwargs, env.__getitem__)
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    if node.target not in (LAYER_NORM, GROUP_NORM):

        def reduction(own: fx.Node) -> fx.Node:
            return graph.call_function(node.target, (own, *args[1:]), kwargs)  # type: ignore[arg-type]

        return by_owner(graph, constants, source, axis, value.dtype, reduction, reduces=True)
    place = 2 if node.target is LAYER_NORM else 1
    scale, shift = args[place : place + 2]
    args[place : place + 2] = None, None

    def norm(own: fx.Node) -> fx.Node:
        whole = graph.call_function(node.target, (own, *args[1:]))  # type: ignore[arg-type]
        return graph.call_function(operator.getitem, (whole, 0))

    found = by_owner(graph, constants, source, axis, value.dtype, norm)
    for vector, op in ((scale, aten.mul.Tensor), (shift, aten.add.Tensor)):
        if vector is not None:
            if node.target is GROUP_NORM:
                vector = graph.call_function(aten.reshape.default, (vector, [-1, *[1] * (value.dim() - 2)]))
            found = graph.call_function(op, (found, vector))
    return found


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
    GROUP_NORM: _group_norm,
}
