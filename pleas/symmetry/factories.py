"""Values a graph makes from nothing become constants: an export writes the device of its example into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

LARGEST = 1 << 24  # elements of a constant that is written down


def constants_for_factories(graph: fx.Graph) -> dict[str, Tensor]:
    """Rewrite factory ops in place; returns the new constants by get_attr target ("constants.NAME").

    A constant goes where the network goes, a factory op stays on the device of the export. `full` of any size, the
    batch size among them, becomes an expanded single number. Ops that read a tensor lose their device: it is that of
    the tensor.
    """
    made: dict[str, Tensor] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.kwargs.get("device") is None:
            continue
        reads = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]
        if reads:
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "device"}
        elif node.target is aten.full.default:
            value = _value(node, ([1] * len(node.args[0]), *node.args[1:]))  # type: ignore[arg-type]
            with graph.inserting_before(node):
                source = _constant(graph, node, value, made)
                wide = graph.call_function(aten.expand.default, (source, node.args[0]))
            wide.meta = dict(node.meta)
            _replace(graph, node, wide)
        elif _is_fixed(node):
            with graph.inserting_before(node):
                source = _constant(graph, node, _value(node, node.args), made)
            _replace(graph, node, source)
    return made


def _is_fixed(node: fx.Node) -> bool:
    """No size depends on the batch, and no random number is drawn."""
    value: Any = node.meta.get("val")
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", [])
    return isinstance(value, Tensor) and not node.all_input_nodes and not random and value.numel() <= LARGEST


def _value(node: fx.Node, args: Any) -> Tensor:
    return node.target(*args, **{**node.kwargs, "device": torch.device("cpu")})  # type: ignore[operator]


def _constant(graph: fx.Graph, node: fx.Node, value: Tensor, made: dict[str, Tensor]) -> fx.Node:
    target = f"constants.{node.name}"
    made[target] = value
    source = graph.create_node("get_attr", target)
    fake: Any = node.meta["val"]
    with fake.fake_mode:
        held = torch.empty(value.shape, dtype=value.dtype, device=fake.device)
    source.meta = {**node.meta, "val": held}
    return source


def _replace(graph: fx.Graph, node: fx.Node, other: fx.Node) -> None:
    node.replace_all_uses_with(other)
    graph.erase_node(node)
