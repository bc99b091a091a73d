"""Rules of the ops that only move elements: the op itself is run on the labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pleas.symmetry.algebra import drop_dims, move
from pleas.symmetry.contractions import space_mixed
from pleas.symmetry.labels import Val, canonical, positions, squash, varying
from pleas.symmetry.rules import Op, Result, rule, unlisted


@rule("view", "_unsafe_view", "reshape", "flatten", "unflatten", "_reshape_copy", "view_copy")
def view(op: Op) -> Result:
    """The same elements in the same order, in other dimensions."""
    return op.algebra.reshaped(op["self"], op.shape)


@rule("permute", "transpose", "t", "numpy_T", "permute_copy")
def permute(op: Op) -> Result:
    """Dimensions in another order."""
    dims = op.args.get("dims")
    if dims is not None:
        return move(op["self"], op.shape, lambda t: t.permute(dims))
    first, second = op.args.get("dim0", 0), op.args.get("dim1", -1)
    return move(op["self"], op.shape, lambda t: t.transpose(first, second))


@rule("unsqueeze")
def unsqueeze(op: Op) -> Result:
    """One more dimension of size 1."""
    return move(op["self"], op.shape, lambda t: t.unsqueeze(op["dim"]))


@rule("squeeze")
def squeeze(op: Op) -> Result:
    """Dimensions of size 1 removed."""
    value, dims = op["self"], op.args.get("dim")
    asked = range(len(value.shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = [d % len(value.shape) for d in asked]
    return drop_dims(value, [d for d in gone if value.shape[d] == 1])


@rule("expand", "broadcast_to")
def expand(op: Op) -> Result:
    """Repeated along dimensions of size 1: labels do not vary there, and need not."""
    value, ndim = op["self"], len(op.shape)

    def lift(label: Tensor) -> Tensor:
        return label.reshape((1,) * (ndim - label.dim()) + tuple(label.shape))

    return Val(op.shape, [lift(f) for f in value.free], [lift(f) for f in value.fixed])


@rule("repeat")
def repeat(op: Op) -> Result:
    """Copies side by side: equal elements, equal labels."""
    return move(op["self"], op.shape, lambda t: t.repeat(op["repeats"]), range(len(op["self"].shape)))


@rule("flip")
def flip(op: Op) -> Result:
    """Elements in reverse order."""
    return move(op["self"], op.shape, lambda t: t.flip(op["dims"]))


@rule("roll")
def roll(op: Op) -> Result:
    """Elements moved round in circles."""
    if not op["dims"]:
        return unlisted(op)
    return move(op["self"], op.shape, lambda t: t.roll(op["shifts"], op["dims"]))


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold", "unfold_copy")
def rearranged(op: Op) -> Result:
    """The op itself, run on the labels."""
    rest = [a for name, a in op.args.items() if name != "self"]
    return move(op["self"], op.shape, lambda t: op.node.target(t, *rest), range(len(op["self"].shape)))  # type: ignore[operator]


@rule("select", "slice", "narrow", "select_copy", "slice_copy")
def selection(op: Op) -> Result:
    """Some of the elements; units that are picked are told apart from those that are not."""
    rest = [a for name, a in op.args.items() if name != "self"]
    return _picked(op, 0, lambda t: op.node.target(t, *rest), [op["dim"]])  # type: ignore[operator]


@rule("split", "split_with_sizes", "chunk", "unbind", "tensor_split", "split_copy", "split_with_sizes_copy")
def pieces(op: Op) -> Result:
    """Several selections; units of different pieces are told apart."""
    rest = [a for name, a in op.args.items() if name != "self"]
    parts = range(len(op.shapes))
    return [_picked(op, i, lambda t, i=i: op.node.target(t, *rest)[i], [op["dim"]]) for i in parts]  # type: ignore[operator]


def _picked(op: Op, part: int, pick: Any, dims: list[int]) -> Val:
    value = op["self"]
    result = move(value, op.shapes[part], pick, dims)
    touched = {d % len(value.shape) for d in dims}
    selected = [
        after for before, after in zip(value.free, result.free, strict=True) if varying(before) & touched
    ]
    op.algebra.see(Val(result.shape, selected), part)
    return result


@rule("index", "index_select", "embedding")
def index(op: Op) -> Result:
    """Elements at constant indices; an index that depends on the input pins everything."""
    if op.name == "embedding":
        value, indices = op["weight"], [op["indices"]]
    elif op.name == "index_select":
        value, indices = op["self"], [None] * (op["dim"] % len(op["self"].shape)) + [op["index"]]
    else:
        value, indices = op["self"], list(op["indices"])
    if any(i is not None and i.const is None for i in indices):
        return unlisted(op)
    places = tuple(slice(None) if i is None else i.const for i in indices)
    dims = [d for d, i in enumerate(indices) if i is not None]
    result = move(value, op.shape, lambda t: t[places], range(len(value.shape)))
    selected = [
        after for before, after in zip(value.free, result.free, strict=True) if varying(before) & set(dims)
    ]
    op.algebra.see(Val(result.shape, selected))
    return result


@rule("as_strided")
def as_strided(op: Op) -> Result:
    """Elements by their place in memory, which the exported strides give."""
    source = op.node.args[0].meta["val"]  # type: ignore[union-attr]
    strides = [int(s) for s in source.stride()]
    size, stride, offset = op["size"], op["stride"], op["storage_offset"] or 0

    def run(label: Tensor) -> Tensor:
        laid = torch.empty_strided(label.shape, strides, dtype=label.dtype).copy_(label)
        return laid.as_strided(size, stride, offset)

    return op.algebra.see(move(op["self"], op.shape, run, range(len(op["self"].shape))))


# several sources ---------------------------------------------------------------------------------------------


@rule("cat")
def cat(op: Op) -> Result:
    """Pieces side by side along `dim`; along the other dimensions they are tied like the terms of a sum."""
    values = [v for v in op["tensors"] if v.shape != (0,)]
    dim = op["dim"] % len(op.shape)
    return _assembled(op, values, dim, lambda labels: torch.cat(labels, dim))


@rule("slice_scatter", "select_scatter")
def scatter(op: Op) -> Result:
    """A slice of `self` replaced by `src`."""
    dim = op["dim"] % len(op.shape)
    source = op["src"]
    if op.name == "select_scatter":
        shape = (*source.shape[:dim], 1, *source.shape[dim:])
        source = op.algebra.reshaped(source, shape)
        start, end, step = op["index"] % op.shape[dim], None, 1
        end = start + 1
    else:
        start, end, step = op["start"], op["end"], op["step"]

    def run(labels: list[Tensor]) -> Tensor:
        into, piece = labels
        return into.slice_scatter(piece, dim, start, end, step)

    return _assembled(op, [op["self"], source], dim, run)


def _assembled(op: Op, values: list[Val], dim: int, run: Any) -> Val:
    """Values put together along `dim` by `run`, which is given one label per value, of full extent along dim.

    Labels that do not vary along dim are related as if the pieces were terms of a sum. Along dim, free labels are
    put together; a piece that has none is neutral or pinned. Pieces are told apart by a fixed label.
    """
    ndim = len(op.shape)
    flat = [_off(value, dim) for value in values]
    shape = tuple(1 if d == dim else size for d, size in enumerate(op.shape))
    result = op.algebra.meet(flat, shape)
    free = [[f for f in value.free if dim in varying(f)] for value in values]
    fixed = [[f for f in value.fixed if dim in varying(f)] for value in values]
    together: list[Tensor] = []
    for k in range(max(len(labels) for labels in free)):
        parts = [
            _extent(value, labels[min(k, len(labels) - 1)] if labels else _stand_in(op, value, dim), dim)
            for value, labels in zip(values, free, strict=True)
        ]
        together.append(squash(run(_same_extent(parts, dim))))
    tags = [torch.full((1,) * ndim, k).expand(_only(dim, value.shape)) for k, value in enumerate(values)]
    places = [squash(run(tags))]
    for k in range(max(len(labels) for labels in fixed)):
        parts, offset = [], 0
        for value, labels in zip(values, fixed, strict=True):
            label = labels[k] + 1 if k < len(labels) else torch.zeros((1,) * ndim, dtype=torch.int64)
            parts.append(_extent(value, label + offset, dim))
            offset += int(label.max()) + 1
        places.append(canonical(squash(run(_same_extent(parts, dim)))))
    return op.algebra.settle(Val(op.shape, result.free + together, result.fixed + places))


def _off(value: Val, dim: int) -> Val:
    """The labels that do not vary along dim, with dim of size 1."""
    shape = tuple(1 if d == dim else size for d, size in enumerate(value.shape))
    keep = [[f for f in labels if dim not in varying(f)] for labels in (value.free, value.fixed)]
    return Val(shape, keep[0], keep[1])


def _only(dim: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size if d == dim else 1 for d, size in enumerate(shape))


def _extent(value: Val, label: Tensor, dim: int) -> Tensor:
    return label.expand([value.shape[dim] if d == dim else size for d, size in enumerate(label.shape)])


def _same_extent(labels: list[Tensor], dim: int) -> list[Tensor]:
    """Expanded to a common size along the dimensions other than dim."""
    sizes = [max(label.shape[d] for label in labels) for d in range(labels[0].dim())]
    return [
        label.expand([label.shape[d] if d == dim else sizes[d] for d in range(label.dim())])
        for label in labels
    ]


def _stand_in(op: Op, value: Val, dim: int) -> Tensor:
    """Ids for a piece without free labels along dim: neutral if it is uniform there, else pinned."""
    if not any(dim in varying(f) for f in value.fixed):
        return torch.full((1,) * len(value.shape), -1)
    ids = op.ledger.fresh(value.shape[dim], op.algebra.name)
    op.ledger.pin(ids, op.algebra.salt, "concatenated with fixed positions")
    return ids.reshape([-1 if d == dim else 1 for d in range(len(value.shape))])


@rule("constant_pad_nd")
def pad(op: Op) -> Result:
    """New elements of one value at the border: neutral among units, a position of their own among positions."""
    value, amounts = op["self"], op["pad"]
    ndim = len(value.shape)
    padded = {ndim - 1 - k // 2 for k, amount in enumerate(amounts) if amount}

    def run(label: Tensor, fill: int) -> Tensor:
        # Only along dims the label varies on: it says nothing about the others, with or without border.
        mine = [a if ndim - 1 - k // 2 in varying(label) else 0 for k, a in enumerate(amounts)]
        return torch.nn.functional.pad(label, mine, value=fill)

    free = [run(f, -1) for f in value.free]
    fixed = [canonical(squash(run(f, int(f.max()) + 1))) for f in value.fixed]
    seen = frozenset().union(*(varying(f) for f in free + fixed))
    borders = [_border(op, d) for d in padded - seen]
    op.algebra.see(
        Val(op.shape, [f for f, old in zip(free, value.free, strict=True) if varying(old) & padded])
    )
    return Val(op.shape, free, fixed + borders)


def _border(op: Op, dim: int) -> Tensor:
    """1 on the border of a dimension, 0 inside."""
    before = op["pad"][2 * (len(op.shape) - 1 - dim)]
    inside = torch.ones(op.shape[dim], dtype=torch.int64)
    inside[before : before + op["self"].shape[dim]] = 0
    return squash(inside.reshape([-1 if d == dim else 1 for d in range(len(op.shape))]))


@rule("im2col")
def im2col(op: Op) -> Result:
    """Sliding blocks as columns: (n, c * window, places); window and places are positions."""
    value = op["self"]
    batch, channels = value.shape[:2]
    window = op.shape[1] // channels
    mixed = op.algebra.reshaped(space_mixed(op, value, 2), (batch, channels, 1, 1))
    shape = (batch, channels, window, op.shape[2])
    spread = Val(shape, mixed.free, [*mixed.fixed, *positions(shape, [2, 3])])
    return op.algebra.reshaped(spread, op.shape)
