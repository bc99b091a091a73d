"""From a plan to a module: the widened graph, its layers in blocks, and the parents' own class where nothing grew."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from pleas.layers.layer import Layer
from pleas.network.module import BlockLayer, build_network
from pleas.network.widen import Layouts, edit_graph
from pleas.parents import Parents
from pleas.plan.blocks import Block, blocks_of
from pleas.plan.plan import Plan


@dataclass(frozen=True)
class Drawing:
    """The merged network before it has weights.

    layouts: of every axis
    blocks:  layer -> which of its outputs read which inputs
    graph:   the parents' graph with the plan's widths; a layer in more than one block is a call of a module named as it
    became:  node of the parents' graph -> node of `graph`
    constants: tensors that `graph` reads and no parent has, by name
    """

    layouts: Layouts
    blocks: Mapping[str, tuple[Block, ...]]
    graph: fx.Graph
    became: Mapping[fx.Node, fx.Node]
    constants: Mapping[str, Tensor]

    everything = (Block(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)),)

    @property
    def split(self) -> set[str]:
        """Layers in more than one block."""
        return {name for name, blocks in self.blocks.items() if len(blocks) > 1}


def draw(parents: Parents, plan: Plan) -> Drawing:
    """Raises UnsupportedModel where the graph cannot take the plan's widths."""
    layouts = Layouts(parents.symmetry, plan.classes, parents.count)
    blocks = {
        layer.name: blocks_of(layer, layouts.axis(layer.weight, 1), layouts.axis(layer.weight, 0))
        for layer in parents.layers
    }
    split = {name for name, found in blocks.items() if len(found) > 1}
    return Drawing(layouts, blocks, *edit_graph(parents.symmetry, layouts, parents.layers, split))


def build(parents: Parents, plan: Plan, drawing: Drawing, state: Mapping[str, Tensor]) -> nn.Module:
    """The merged network with these tensors, on the CPU, in evaluation mode."""
    program, first = parents.symmetry.program, parents.states[0]
    state = {
        name: value.to("cpu", first[name].dtype if name in first else value.dtype)
        for name, value in state.items()
    }
    widened = any(p.widened or p.parts for p in plan.classes.values())
    if not widened and not program.added:
        module = copy.deepcopy(parents.modules[0]).cpu()
        own = module.state_dict()
        saved = {name: value for name, value in state.items() if name in own}  # some buffers are not
        tied = {alias: state[name] for alias, name in program.tied.items() if name in state}
        module.load_state_dict(own | saved | tied)
        return module.eval()
    # A graph serves one module: a second network of the same plan gets its own.
    graph, _, _ = edit_graph(parents.symmetry, drawing.layouts, parents.layers, drawing.split)
    modules: dict[str, BlockLayer] = {}
    consumed: set[str] = set()
    for layer in parents.layers:
        if layer.name in drawing.split:
            modules[layer.name] = block_layer(layer, drawing.blocks[layer.name], drawing.layouts, state)
            consumed |= {layer.weight, *([layer.bias] if layer.bias else [])}
    parameters = {*program.parameters, *program.added}
    tensors = {
        str(node.target): (
            _tensor(str(node.target), {**state, **drawing.constants}, program.constants),
            str(node.target) in parameters,
        )
        for node in graph.nodes
        if node.op == "get_attr" and node.target not in consumed
    }
    parts = next((p.parts for p in plan.classes.values() if p.parts), None)
    return build_network(graph, modules, tensors, parts or (_outputs(parents, drawing),), program.notes)


def _outputs(parents: Parents, drawing: Drawing) -> int:
    output = next(node for node in parents.symmetry.program.graph.nodes if node.op == "output").args[0]
    return drawing.layouts.value(output, -1).size  # type: ignore[arg-type]


def _tensor(name: str, state: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> Tensor:
    # A fresh copy: equal strides make equal bits after a reload, also where a kernel of size 1 leaves them open.
    value = state[name] if name in state else constants[name]
    return value.clone(memory_format=torch.contiguous_format)


def block_layer(
    layer: Layer, blocks: tuple[Block, ...], layouts: Layouts, state: Mapping[str, Tensor]
) -> BlockLayer:
    """A layer as the blocks that are not structurally zero."""
    rows = torch.cat([block.rows for block in blocks])
    order = None if bool((rows.diff() > 0).all()) else rows.argsort().tolist()
    geometry = None
    if layer.is_convolution:
        geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": 1}
        geometry = {
            key: list(value) if isinstance(value, tuple) else value for key, value in geometry.items()
        }
    module = BlockLayer(
        kernel=layer.kernel,
        reads=[_reads(block.columns) for block in blocks],
        widths=[len(block.columns) for block in blocks],
        rows=[len(block.rows) for block in blocks],
        units=layouts.axis(layer.weight, 1).size,
        order=order,
        bias=layer.bias is not None,
        geometry=geometry,
    )
    weight = state[layer.weight].cpu()
    with torch.no_grad():
        for name, block in zip(module.weight_names, blocks, strict=True):
            module.get_parameter(name).copy_(weight[block.rows][:, block.columns])
        if layer.bias is not None:
            module.get_parameter("bias").copy_(state[layer.bias].cpu()[rows])
    return module.to(weight.dtype)


def _reads(columns: Tensor) -> dict[str, list[int]]:
    first, last = int(columns[0]), int(columns[-1]) + 1
    return {"slice": [first, last]} if last - first == len(columns) else {"index": columns.tolist()}
