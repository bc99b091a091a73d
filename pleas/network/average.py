"""Tensors that no least squares covers: merged by averaging over matched units.

What matters is whether a tensor is multiplied into activations. A weight reads units, and a fused unit's weight on
a unit that only A keeps counts half. Everything else (biases, scales, positional embeddings, tables of
relative positions) belongs to units, and an entry that belongs to a unit of A alone is A's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from pleas.layers.layer import CONVOLUTION, LINEAR
from pleas.network.widen import Layouts
from pleas.plan.blocks import partial_merge
from pleas.plan.layout import Layout, plain_layout
from pleas.symmetry import Symmetry
from pleas.symmetry.program import Program

aten = torch.ops.aten
_PRODUCTS = {
    CONVOLUTION: (1,),
    LINEAR: (1,),
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
}


def average(
    name: str,
    states: Sequence[Mapping[str, Tensor]],
    symmetry: Symmetry,
    layouts: Layouts,
    weights: frozenset[str],
) -> Tensor:
    """The merged tensor of parents whose units are aligned. weights: what `contracted` gives."""
    own = [state[name] for state in states]
    if not own[0].is_floating_point():
        return own[0].clone()
    if name in weights and own[0].dim() > 1:
        return _averaged_weight(name, own, symmetry, layouts)
    return _averaged_table(name, own, layouts)


def contracted(program: Program) -> frozenset[str]:
    """Names of tensors that reach a product as one of its operands before any activation joins them."""
    computed = _activations(program.graph)
    found: set[str] = set()
    for start in program.graph.nodes:
        if start.op != "get_attr":
            continue
        seen: set[fx.Node] = {start}
        waiting = [start]
        while waiting:
            node = waiting.pop()
            for user in node.users:
                if any(user.args[i] is node for i in _PRODUCTS.get(user.target, ())):
                    found.add(str(start.target))
                elif user not in seen and user not in computed:
                    seen.add(user)
                    waiting.append(user)
    return frozenset(found)


def _activations(graph: fx.Graph) -> set[fx.Node]:
    """Values that depend on the pixels; sizes of the batch do not."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        size = isinstance(node.meta.get("val"), int | torch.SymInt)
        if node.op == "placeholder" or (not size and any(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found


def _averaged_weight(name: str, own: Sequence[Tensor], symmetry: Symmetry, layouts: Layouts) -> Tensor:
    outputs = layouts.axis(name, 0)
    # The rows of a grouped weight carry the groups; its inner axis does not grow.
    grouped = symmetry.groups.get(name, 1) > 1
    inputs = plain_layout(own[0].shape[1], len(own)) if grouped else layouts.axis(name, 1)
    flat = [x.double().reshape(x.shape[0], x.shape[1], -1).movedim(1, 2) for x in own]
    merged = partial_merge(flat, inputs, outputs).movedim(2, 1)
    return merged.reshape(outputs.size, inputs.size, *own[0].shape[2:]).to(own[0].dtype)


def _averaged_table(name: str, own: Sequence[Tensor], layouts: Layouts) -> Tensor:
    """An entry is the mean over the parents that own it along every axis, and 0 where there is none."""
    found = {dim: layouts.axis(name, dim) for dim in range(own[0].dim())}
    return mean_of_owners(own, {dim: layout for dim, layout in found.items() if not layout.plain})


def mean_of_owners(
    values: Sequence[Tensor], layouts: Mapping[int, Layout], shares: Sequence[Tensor] | None = None
) -> Tensor:
    """One tensor of merged units from aligned parents' tensors of their own; layouts: of the dimensions that differ.

    shares: how much each parent counts, not negative, in a shape that broadcasts against its value; None: all alike.
    Where the shares of all owners of a unit are nil, they count alike: a unit that one parent owns is its own
    everywhere.
    """
    if shares is not None:
        return _weighted(values, layouts, shares)
    if not layouts:
        return sum(values[1:], values[0]) / len(values)
    total, count = None, None
    for parent, value in enumerate(values):
        own, held = _held(parent, value, layouts)
        total = own if total is None else total + own
        count = held if count is None else count + held
    assert total is not None
    assert count is not None
    return total / count.clamp_min(1)


def _held(parent: int, value: Tensor, layouts: Mapping[int, Layout]) -> tuple[Tensor, Tensor]:
    """A parent's value in merged units, 0 where it owns none, and where it does own them."""
    held = torch.ones((), dtype=value.dtype, device=value.device)
    for dim, layout in layouts.items():
        shape = [-1 if other == dim else 1 for other in range(value.dim())]
        held = held * (layout.masks >> parent & 1).to(value).view(shape)
        # A parent that is no owner may have no such position: whatever stands there counts for nothing.
        index = layout.sources[parent].clamp_max(value.shape[dim] - 1)
        value = value.index_select(dim, index.to(value.device))
    return value * held, held


def _weighted(values: Sequence[Tensor], layouts: Mapping[int, Layout], shares: Sequence[Tensor]) -> Tensor:
    found = [_held(parent, value, layouts) for parent, value in enumerate(values)]
    counts = [held * share.to(own) for (own, held), share in zip(found, shares, strict=True)]
    total = sum(counts[1:], counts[0])
    alike = sum((held for _, held in found[1:]), found[0][1]).clamp_min(1)
    result = torch.zeros_like(found[0][0])
    for (own, held), count in zip(found, counts, strict=True):
        result += own * torch.where(
            total > 0, count / total.clamp_min(torch.finfo(own.dtype).tiny), held / alike
        )
    return result
