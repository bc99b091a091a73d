"""From a plan to a module: widened shapes, layers in blocks, and the parents' own class where nothing grew."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import pleas
from pleas.network.build import block_layer, build, draw
from pleas.network.module import BlockLayer, MergedNetwork
from pleas.solve.propagate import averaged_state
from pleas.symmetry import execute
from tests.merging import NAMES, SEPARATE, difference, evidence_of, images, outputs, parents, permuted_copy


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_the_drawing_has_the_plans_widths(name: str, count: int) -> None:
    """What runs has the shapes that the layouts say, at every node that has units."""
    evidence = evidence_of(name, parents(name, count))
    networks = evidence.parents
    plan = pleas.make_plan(evidence, apart=0.5)
    drawing = draw(networks, plan)
    for node in networks.symmetry.program.graph.nodes:
        assert node in drawing.became
    for layer in networks.layers:
        rows = torch.cat([block.rows for block in drawing.blocks[layer.name]])
        assert rows.sort().values.tolist() == list(range(drawing.layouts.axis(layer.weight, 0).size))
    module = build(networks, plan, drawing, averaged_state(evidence, drawing))
    assert isinstance(module, MergedNetwork)
    assert not module.training
    assert outputs(module, images(name, 3)).shape == outputs(parents(name)[0], images(name, 3)).shape
    inside = {name for name, m in module.named_modules() if isinstance(m, BlockLayer)}
    assert inside == drawing.split


def test_nothing_apart_is_the_parents_graph() -> None:
    evidence = evidence_of("residual", parents("residual"))
    plan = pleas.make_plan(evidence, budget=1.0)
    drawing = draw(evidence.parents, plan)
    assert drawing.split == set()
    assert all(len(blocks) == 1 for blocks in drawing.blocks.values())
    module = build(evidence.parents, plan, drawing, evidence.parents.states[0])
    assert type(module) is type(parents("residual")[0])
    x = images("residual", 4)
    assert torch.equal(outputs(module, x), outputs(parents("residual")[0], x))


def test_a_second_network_of_one_drawing_is_its_own() -> None:
    evidence = evidence_of("residual", parents("residual"))
    plan = pleas.make_plan(evidence, apart=0.5)
    drawing = draw(evidence.parents, plan)
    state = averaged_state(evidence, drawing)
    first, second = (build(evidence.parents, plan, drawing, state) for _ in range(2))
    for p in first.parameters():
        p.data.zero_()
    assert all(bool(p.detach().any()) for p in second.parameters() if p.dim() > 1)


@pytest.mark.parametrize("count", [2, 3])
def test_a_layer_in_blocks_is_the_dense_layer_with_its_zeros(count: int) -> None:
    evidence = evidence_of("residual", parents("residual", count))
    drawing = draw(evidence.parents, pleas.make_plan(evidence, apart=0.5))
    state = averaged_state(evidence, drawing)
    split = [layer for layer in evidence.parents.layers if layer.name in drawing.split]
    assert split
    for layer in split:
        blocks = drawing.blocks[layer.name]
        module = block_layer(layer, blocks, drawing.layouts, state)
        x = torch.randn(2, drawing.layouts.axis(layer.weight, 1).size, *(5, 5) * layer.is_convolution)
        weight = state[layer.weight]
        bias = state[layer.bias] if layer.bias else None
        dense = (
            nn.functional.conv2d(x, weight, bias, layer.stride, layer.padding)
            if layer.is_convolution
            else nn.functional.linear(x, weight, bias)
        )
        torch.testing.assert_close(module(x), dense, rtol=1e-4, atol=1e-5)
        stored = sum(module.get_parameter(name).numel() for name in module.weight_names)
        assert stored < weight.numel()


def test_heads_are_told_apart_by_the_module() -> None:
    evidence = evidence_of("plain", parents("plain", 3), SEPARATE)
    plan = pleas.make_plan(evidence, budget=1.0)
    drawing = draw(evidence.parents, plan)
    module = build(evidence.parents, plan, drawing, averaged_state(evidence, drawing))
    assert module.head_sizes == (5, 5, 5)
    parts = outputs(module, images("plain", 4)).split(module.head_sizes, 1)  # type: ignore[arg-type]
    assert [part.shape for part in parts] == [(4, 5)] * 3


def test_values_of_the_merged_network_are_laid_out_as_drawn() -> None:
    """Of copies every merged value is the parents' value, each position where the layout says it comes from."""
    modules = (parents("residual")[0], permuted_copy("residual", 3), permuted_copy("residual", 4))
    evidence = evidence_of("residual", modules)
    plan = pleas.make_plan(evidence, apart=0.5)
    drawing = draw(evidence.parents, plan)
    module = build(evidence.parents, plan, drawing, averaged_state(evidence, drawing))
    assert isinstance(module, MergedNetwork)
    x = images("residual", 3)
    graph = evidence.parents.symmetry.program.graph
    own: dict[str, torch.Tensor] = {}

    def keep(node: torch.fx.Node, values: list) -> None:
        if isinstance(values[0], torch.Tensor):
            own[node.name] = values[0].clone()

    with torch.no_grad():
        execute(graph, [evidence.states[0]], [x], seen=keep)
        merged = Values(module).of(x)
    checked = 0
    for node in graph.nodes:
        name = drawing.became[node].name
        if node.name in own and name in merged and drawing.layouts.widened(node):
            expected = own[node.name]
            for dim, layout in drawing.layouts.widened(node).items():
                expected = expected.index_select(dim, layout.sources[0])
            assert difference(merged[name], expected) < 1e-4, node.name
            checked += 1
    assert checked > 20


class Values(torch.fx.Interpreter):
    """Every tensor of a graph by the name of its node."""

    def of(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.found: dict[str, torch.Tensor] = {}
        self.run(x)
        return self.found

    def run_node(self, n: torch.fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and n.op != "get_attr":
            self.found[n.name] = value.clone()
        return value


def test_block_boundaries_follow_one_another() -> None:
    """Of two parents every read is a slice."""
    evidence = evidence_of("residual", parents("residual"))
    drawing = draw(evidence.parents, pleas.make_plan(evidence, apart=0.5))
    for name in drawing.split:
        for block in drawing.blocks[name]:
            assert all(b - a == 1 for a, b in pairwise(block.columns.tolist()))
