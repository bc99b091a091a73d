"""Which reductions over units a widened network can take for every parent by itself.

A layer norm or a mean over channels runs over one dimension of units, and what it finds meets these units again. Then
every parent's view of the dimension gives a number of its own, and each unit takes those of its owners. Where the
number goes elsewhere (into a convolution, into the logits), there is no unit to tell whose it is.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from pleas.symmetry.groups import DimUnits, Symmetry, units_along
from pleas.symmetry.labels import Val, varying
from pleas.symmetry.rules import is_pointwise, op_name

LAYER_NORM = torch.ops.aten.native_layer_norm.default
GROUP_NORM = torch.ops.aten.native_group_norm.default
OWNED = {"mean", "sum", "var", "std", "amax", "amin", "linalg_vector_norm"}
STRANGERS = "a {op} over it meets units of another order ({node})"


def dims_with_units(value: Val, dims: Iterable[int]) -> list[int]:
    """Those of the dimensions along which units vary."""
    found = {d % len(value.shape) for d in dims} if value.shape else set()
    return sorted(found & {d for label in value.free for d in varying(label)})


def is_owned(node: fx.Node, dim: int) -> bool:
    """Whether what a reduction over `dim` (counted from the end, and kept) finds meets nothing but full dimensions,
    element by element."""
    return op_name(node.target) in OWNED and all(ok for _, ok in _users(node, dim))  # type: ignore[arg-type]


def reduced_dims(node: fx.Node) -> list[int]:
    """The dimensions of its first argument that a norm or a reduction of `OWNED` runs over; none for other ops."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    source = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], fx.Node) else None
    if not isinstance(source, torch.Tensor):
        return []
    count = source.dim()
    if node.target is LAYER_NORM:
        return list(range(count - len(node.args[1]), count))  # type: ignore[arg-type]
    if node.target is GROUP_NORM:
        return list(range(1, count)) if node.args[6] == 1 else []
    if op_name(node.target) not in OWNED:
        return []
    names = [argument.name for argument in node.target._schema.arguments]
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    dims = given.get("dim")
    chosen = range(count) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return sorted({d % count for d in chosen})


def reduced_over(symmetry: Symmetry) -> frozenset[int]:
    """Classes whose units a norm, or another reduction that is taken owner by owner, runs over: residual streams."""
    found: set[int] = set()
    for node in symmetry.program.graph.nodes:
        for dim in reduced_dims(node):
            units = symmetry.value(node.args[0].name, dim)  # type: ignore[union-attr]
            found |= set() if units is None else set(units.cls.unique().tolist())
    return frozenset(found - {-1})


def strangers(node: fx.Node, values: Mapping[str, Val], place: DimUnits) -> Iterator[tuple[int, str]]:
    """Classes that a reduction runs over and whose numbers meet other units, or theirs in another order."""
    if not isinstance(node.target, torch._ops.OpOverload) or op_name(node.target) not in OWNED:
        return
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    shape, after = values[source.name].shape, values[node.name].shape
    if len(after) != len(shape):
        return
    for dim in range(len(shape)):
        own = units_along(values[source.name], dim, place)
        if after[dim] > 1 or shape[dim] == 1 or own is None:
            continue
        reason = STRANGERS.format(op=op_name(node.target), node=node.name)
        for user, _ in _users(node, dim - len(shape)):
            for other in user.all_input_nodes:
                if other.name not in values or _size(other, dim - len(shape)) in (0, 1):
                    continue
                theirs = units_along(
                    values[other.name], len(values[other.name].shape) + dim - len(shape), place
                )
                if theirs is None or not (
                    torch.equal(own.cls, theirs.cls) and torch.equal(own.unit, theirs.unit)
                ):
                    yield from ((c, reason) for c in own.cls.unique().tolist() if c >= 0)


def _users(node: fx.Node, dim: int) -> Iterator[tuple[fx.Node, bool]]:
    """The ops that a reduced number reaches until it has met full dimensions, and whether each is element by element.

    dim: the reduced dimension, counted from the end
    """
    seen, waiting = {node}, [node]
    while waiting:
        here = waiting.pop()
        for user in here.users:
            if user in seen:
                continue
            seen.add(user)
            pointwise = user.op == "call_function" and (
                user.target is operator.getitem or is_pointwise(user.target)
            )
            yield user, pointwise
            if pointwise and _size(user, dim) <= 1:
                waiting.append(user)


def _size(node: fx.Node, dim: int) -> int:
    """Of one dimension, counted from the end; 0 where a value has no such."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() < -dim:
        return 0
    size = value.shape[dim]
    return size if isinstance(size, int) else 2
