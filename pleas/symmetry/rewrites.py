"""Named rewrites of the exported graph: the same function, in a form that has more freedom.

A rewrite takes a Program and returns one; it is listed in REWRITES, asked for by name, and says in `notes` what it did.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from pleas.symmetry.export import Program

aten = torch.ops.aten


def pad_to_conv(program: Program) -> Program:
    """Turn zero-padding of channels into a 1x1 convolution with an explicit selection weight.

    ResNets with parameter-free shortcuts (He et al. 2016, option A) subsample and pad with zero channels. As a
    convolution the shortcut has a weight like any other layer: its two sides no longer have to be permuted alike, and
    a merge can fit it.
    """
    graph, added, notes = program.graph, dict(program.added), list(program.notes)
    taken = {*program.parameters, *program.buffers, *program.tied, *added}
    for node in list(graph.nodes):
        if node.target is not aten.constant_pad_nd.default or not _pads_channels_with_zeros(node):
            continue
        source, stride = _before_strided_slices(node.args[0])
        before, after = node.args[1][4:6]
        width = source.meta["val"].shape[1]
        name = _free_name(module_path(node), taken)
        taken.add(name)
        value = torch.zeros(before + width + after, width, 1, 1, dtype=source.meta["val"].dtype)
        value[before : before + width, :, 0, 0] = torch.eye(width)
        added[name] = value
        with graph.inserting_before(node):
            weight = graph.create_node("get_attr", name)
            weight.meta["val"] = _fake_like(node.meta["val"], value)
            arguments = (source, weight, None, stride, [0, 0], [1, 1], False, [0, 0], 1)
            conv = graph.call_function(aten.convolution.default, arguments)
        conv.meta = dict(node.meta)
        node.replace_all_uses_with(conv)
        _erase_unread(graph, node)
        where = module_path(node) or "the forward of the model"
        notes.append(
            f"pad_to_conv: the zero-padded channels in {where} became a 1x1 convolution with weight {name} "
            f"{tuple(value.shape)}, stride {tuple(stride)}."
        )
    return replace(program, added=added, notes=tuple(notes))


REWRITES: dict[str, Callable[[Program], Program]] = {"pad_to_conv": pad_to_conv}


def _pads_channels_with_zeros(node: fx.Node) -> bool:
    """constant_pad_nd(x, [0, 0, 0, 0, before, after], 0) of a 4-d value."""
    pad: Any = node.args[1]
    fill = node.args[2] if len(node.args) > 2 else 0
    four_d = node.meta["val"].dim() == 4
    return bool(
        four_d and fill == 0 and len(pad) == 6 and not any(pad[:4]) and min(pad) >= 0 and any(pad[4:])
    )


def _before_strided_slices(node: Any) -> tuple[fx.Node, list[int]]:
    """Walk up slices `[::s]` of height and width: the value they read, and their strides."""
    stride = [1, 1]
    while node.target is aten.slice.Tensor:
        filled: list[Any] = [*node.args, *(None, 0, None, None, 1)[len(node.args) :]]
        source, dim, start, end, step = filled
        size = source.meta["val"].shape[dim]
        whole = start in (None, 0) and (end is None or end >= size)
        if dim not in (2, 3) or not whole or stride[dim - 2] != 1:
            break
        stride[dim - 2] = step
        node = source
    return node, stride


def module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


def _free_name(path: str, taken: set[str]) -> str:
    prefix = f"{path}." if path else ""
    candidates = ["selection", *(f"selection_{i}" for i in range(1, 1000))]
    return next(name for c in candidates if (name := f"{prefix}{c}.weight") not in taken)


def _fake_like(value: Any, tensor: Tensor) -> Tensor:
    """A tensor without storage for `tensor`, in the same fake mode as `value`."""
    with value.fake_mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=value.device)


def _erase_unread(graph: fx.Graph, node: fx.Node) -> None:
    sources = node.all_input_nodes
    if not node.users and node.op == "call_function":
        graph.erase_node(node)
        for source in sources:
            _erase_unread(graph, source)
