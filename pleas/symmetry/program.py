"""One architecture as a graph, and an interpreter that runs several parents through it in lock-step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from pleas.errors import UnsupportedModel
from pleas.symmetry.copies import device_of, unwrap

aten = torch.ops.aten
# Strides are those of one run: what is a view at export need not be one for another dtype or another kernel.
VIEWS: dict[Any, Any] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
}

Visit = Callable[[fx.Node, list[tuple[Any, ...]], list[dict[str, Any]]], None]
Seen = Callable[[fx.Node, list[Any]], None]


@dataclass(frozen=True)
class Program:
    """One architecture as a graph whose get_attr targets are state-dict keys.

    parameters, buffers: the keys the graph uses, in order of first use in the module
    constants: tensors the graph needs that are in no state dict, by their target ("constants.NAME")
    added:     parameters created by a rewrite, with their initial value, the same for every parent
    tied:      further names of a parameter or buffer -> the name the graph uses
    notes:     what was rewritten, ignored or fixed, one sentence each
    batch:     the batch size baked into the graph, None when any batch size runs
    """

    graph: fx.Graph
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    constants: Mapping[str, Tensor]
    added: Mapping[str, Tensor] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    batch: int | None = None


def state_of(program: Program, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `model` for every get_attr target of the graph (detached, not copied).

    Constants, and what a rewrite added, come to the device of the model. A wrapper (torch.compile, DataParallel) is
    seen through.
    """
    model = unwrap(model)
    tensors = named_tensors(model)
    missing = [name for name in (*program.parameters, *program.buffers) if name not in tensors]
    if missing:
        raise UnsupportedModel(
            f"{type(model).__name__} has no tensor named {missing[0]!r} ({len(missing)} missing in all); "
            "it is not the architecture that was exported"
        )
    state = {name: tensors[name].detach() for name in (*program.parameters, *program.buffers)}
    ours, where = {**program.constants, **program.added}, device_of(model)
    return state | {name: tensor.to(where) for name, tensor in ours.items()}


def execute(
    graph: fx.Graph,
    states: Sequence[Mapping[str, Tensor]],
    inputs: Sequence[Tensor],
    visit: Visit | None = None,
    seen: Seen | None = None,
) -> list[Tensor]:
    """Run several parents in lock-step through one graph; returns each parent's output.

    visit(node, args, kwargs) is called before every call_function node with the resolved arguments of every parent,
    seen(node, values) after it with what it gave.
    A value is dropped after its last use, so memory is that of a plain forward pass times the number of parents.
    The inputs are never changed: an exported graph is functional, and where an op writes in place nevertheless, every
    parent gets a copy of its own.
    """
    last_use = last_uses(graph)
    if any(writes_in_place(node) for node in graph.nodes):
        inputs = [batch.clone() for batch in inputs]
        states = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
    exported = next(node.meta["val"].dtype for node in graph.nodes if node.op == "placeholder")
    values: list[dict[fx.Node, Any]] = [{} for _ in states]
    for node in graph.nodes:
        if node.op == "placeholder":
            for parent, batch in zip(values, inputs, strict=True):
                parent[node] = batch
        elif node.op == "output":
            return [parent[node.args[0]] for parent in values]
        elif node.op == "call_function":
            args, kwargs = _resolve(node, values, states, inputs, exported)
            if visit is not None:
                visit(node, args, kwargs)
            for parent, a, k in zip(values, args, kwargs, strict=True):
                parent[node] = VIEWS.get(node.target, node.target)(*a, **k)
            del args, kwargs
            if seen is not None:
                seen(node, [parent[node] for parent in values])
        for dead in last_use.get(node, ()):
            for parent in values:
                del parent[dead]
    raise AssertionError("a graph without an output node")


def writes_in_place(node: fx.Node) -> bool:
    """Whether an op changes one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def logits_of(output: object) -> Tensor | None:
    """The one tensor of a model's output: itself, the only tensor of a tuple, or the entry called `logits`."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        if isinstance(output.get("logits"), Tensor):
            return output["logits"]
        output = list(output.values())
    if isinstance(output, Sequence):
        tensors = [item for item in output if isinstance(item, Tensor)]
        if len(tensors) == 1:
            return tensors[0]
    return None


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name the module reaches it by, also the non-persistent ones."""
    parameters = model.named_parameters(remove_duplicate=False)
    return dict(parameters) | dict(model.named_buffers(remove_duplicate=False))


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """node -> the values nobody needs after it (states are looked up when needed, not held)."""
    seen: set[fx.Node] = set()
    dead: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        if node.op == "get_attr":
            continue
        unread = [n for n in (*node.all_input_nodes, node) if n not in seen and n.op != "get_attr"]
        seen.update(unread)
        if unread and node.op != "output":
            dead[node] = unread
    return dead


def _resolve(
    node: fx.Node,
    values: Sequence[Mapping[fx.Node, Any]],
    states: Sequence[Mapping[str, Tensor]],
    inputs: Sequence[Tensor],
    exported: torch.dtype,
) -> tuple[list[tuple[Any, ...]], list[dict[str, Any]]]:
    """Every parent's arguments. Export writes down its own device and precision; follow the inputs instead."""
    resolved = []
    for parent, state, batch in zip(values, states, inputs, strict=True):
        found = {n: state[n.target] if n.op == "get_attr" else parent[n] for n in node.all_input_nodes}  # type: ignore[index]
        args, kwargs = map_arg((node.args, node.kwargs), found.__getitem__)
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": batch.device}
        if kwargs.get("dtype") is exported:
            kwargs = {**kwargs, "dtype": batch.dtype}
        resolved.append((args, kwargs))
    return [args for args, _ in resolved], [kwargs for _, kwargs in resolved]
