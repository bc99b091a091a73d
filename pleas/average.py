"""Tensors that no least squares covers: merged by averaging over matched units.

What matters is whether a tensor is multiplied into activations. A weight reads units, and a fused unit's weight on
a unit that only A keeps counts half (design 5). Everything else (biases, scales, positional embeddings, tables of
relative positions) belongs to units, and an entry that belongs to a unit of A alone is A's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from pleas.layers import CONVOLUTION, LINEAR
from pleas.layout import A_ONLY, B_ONLY, plain_layout
from pleas.solve import partial_merge
from pleas.symmetry import Symmetry
from pleas.symmetry.program import Program
from pleas.widen import Layouts

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
    states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    symmetry: Symmetry,
    layouts: Layouts,
    weights: frozenset[str],
) -> Tensor:
    """The merged tensor; B's state is aligned. weights: what `contracted` gives."""
    a, b = (state[name] for state in states)
    if not a.is_floating_point():
        return a.clone()
    if name in weights and a.dim() > 1:
        return _averaged_weight(name, a, b, symmetry, layouts)
    return _averaged_table(name, a, b, layouts)


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


def _averaged_weight(name: str, a: Tensor, b: Tensor, symmetry: Symmetry, layouts: Layouts) -> Tensor:
    outputs = layouts.axis(name, 0)
    # The rows of a grouped weight carry the groups; its inner axis does not grow.
    grouped = symmetry.groups.get(name, 1) > 1
    inputs = plain_layout(a.shape[1]) if grouped else layouts.axis(name, 1)
    flat = [x.double().reshape(x.shape[0], x.shape[1], -1).movedim(1, 2) for x in (a, b)]
    merged = partial_merge(flat[0], flat[1], inputs, outputs).movedim(2, 1)
    return merged.reshape(outputs.size, inputs.size, *a.shape[2:]).to(a.dtype)


def _averaged_table(name: str, a: Tensor, b: Tensor, layouts: Layouts) -> Tensor:
    """Entries of A's units are A's, of B's units B's, of fused units the mean; an entry between the two is 0."""
    only_a = torch.zeros((), dtype=torch.bool)
    only_b = torch.zeros((), dtype=torch.bool)
    merged = [a.double(), b.double()]
    for dim in range(a.dim()):
        layout = layouts.axis(name, dim)
        if not layout.widened:
            continue
        shape = [-1 if other == dim else 1 for other in range(a.dim())]
        only_a = only_a | (layout.kind == A_ONLY).view(shape)
        only_b = only_b | (layout.kind == B_ONLY).view(shape)
        # An output of one parent's head may have no such position in the other: its coefficient is zero.
        merged = [x.index_select(dim, layout.source.clamp_max(x.shape[dim] - 1)) for x in merged]
    mix_a = torch.where(only_a, 1.0, torch.where(only_b, 0.0, 0.5)).double()
    mixed = mix_a * merged[0] + (1 - mix_a) * merged[1]
    return torch.where(only_a & only_b, 0.0, mixed).to(a.dtype)
