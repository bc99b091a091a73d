"""Which classes can get more units? A static check of the arithmetic of widths.

A widened network keeps some units of each parent apart, so a class gets extra units, each with as many positions on
every axis as its other units have. That is impossible where

- an op averages over the units, so that strangers would change each other, and the average does not meet them again
  (marks in the ledger, and `pleas.symmetry.owners`);
- a unit's positions are no slab of one dimension, or a view or a grouped convolution would not come out even
  (channel shuffles, fused projections of one head);
- an op has places of units written into its constants;
- a layer is applied to every unit with the same weights (linear maps over tokens), which A's and B's would need of
  their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from pleas.symmetry.groups import DimUnits
from pleas.symmetry.labels import Val, squash, varying
from pleas.symmetry.owners import strangers
from pleas.symmetry.rules import op_name

Growth = dict[int, int]  # class -> positions of one more unit along one dimension

RAGGED = "its units are not evenly laid out where the network reshapes them ({node})"
GROUPS = "it cuts across the groups of {op} ({node})"
CROSSED = "a {op} is applied to its units one by one, with one weight for all of them ({node})"
CONSTANT = "its places are constants of the op {op} ({node})"

_GROUPED = {"convolution": 8, "native_group_norm": 6}  # op -> which argument is its number of groups
_VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_copy"}


def obstacles(graph: fx.Graph, values: Mapping[str, Val], place: DimUnits) -> dict[int, str]:
    """Top-level class -> why it cannot get more units, as far as the layout of the graph tells."""
    found: dict[int, str] = {}
    growth: dict[str, dict[int, Growth]] = {}
    for node in graph.nodes:
        if node.name not in values:
            continue
        growth[node.name] = grown = {}
        for cls, dim, count in _layout(values[node.name], place):
            if dim is None:
                found.setdefault(cls, RAGGED.format(node=node.name))
            else:
                grown.setdefault(dim, {})[cls] = count
        found_here = (
            *_broken(node, values, growth),
            *_crossed(node, growth),
            *strangers(node, values, place),
        )
        for cls, reason in found_here:
            found.setdefault(cls, reason)
    return found


def _layout(value: Val, place: DimUnits) -> Iterator[tuple[int, int | None, int]]:
    """(class, dimension it stands on or None if there is no one such, positions per unit)."""
    seen: dict[int, tuple[int, Tensor]] = {}
    for label in value.free:
        ids = label.clamp(min=0)
        cls = torch.where(label >= 0, place.cls[ids], -1)
        unit = torch.where(label >= 0, place.unit[ids], -1)
        for c in cls.unique().tolist():
            if c < 0:
                continue
            mine = squash(torch.where(cls == c, unit, -1))
            dims = varying(mine)
            if len(dims) > 1:
                yield c, None, 0
            if len(dims) != 1:
                continue
            dim = next(iter(dims))
            counts = torch.bincount(mine[mine >= 0])
            other = seen.setdefault(dim, (c, mine))
            overlap = other[0] != c and bool(((other[1] >= 0) & (mine >= 0)).any())
            even = len(counts) == 0 or bool((counts == counts[0]).all())
            yield c, dim if even and not overlap else None, int(counts[0])


def _broken(
    node: fx.Node, values: Mapping[str, Val], growth: Mapping[str, Mapping[int, Growth]]
) -> Iterator[tuple[int, str]]:
    """Classes whose growth this op does not allow."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    name = op_name(node.target)
    source = next((n for n in node.all_input_nodes if n.name in growth), None)
    if source is None:
        return
    before, after = growth[source.name], growth[node.name]
    old, new = values[source.name].shape, values[node.name].shape
    for cls in sorted({c for grown in (before, after) for g in grown.values() for c in g}):
        if name in _VIEWS:
            if _volume(old, before, cls) != _volume(new, after, cls):
                yield cls, RAGGED.format(node=node.name)
        elif name in _GROUPED and (groups := int(node.args[_GROUPED[name]])) > 1:  # type: ignore[arg-type]
            more = [_more(grown, 1, cls) * groups / size[1] for grown, size in ((before, old), (after, new))]
            if more[0] != more[1] or more[0] % 1:
                yield cls, GROUPS.format(op=f"a {name}", node=node.name)
        elif any(_more(before, d, cls) for d in _placed_dims(node, name, len(old))):
            yield cls, CONSTANT.format(op=name, node=node.name)


def _crossed(node: fx.Node, growth: Mapping[str, Mapping[int, Growth]]) -> Iterator[tuple[int, str]]:
    """Classes that are the rows of a layer: its weights would have to differ between A's units and B's."""
    name = op_name(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""
    if name not in ("linear", "convolution"):
        return
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    channels = source.meta["val"].dim() - 1 if name == "linear" else 1
    for dim, grown in growth.get(source.name, {}).items():
        if dim != channels:
            yield from ((cls, CROSSED.format(op=name, node=node.name)) for cls in grown)


def _placed_dims(node: fx.Node, name: str, ndim: int) -> list[int]:
    """The dimensions along which an op carries places in its arguments (bounds of slices can be rewritten)."""
    args: Any = node.args
    if name == "index":
        return [d for d, i in enumerate(args[1]) if i is not None]
    if name == "embedding":
        return [0]
    if name in ("index_select", "unfold") or (name == "slice" and len(args) > 4 and args[4] != 1):
        return [int(args[1]) % ndim]
    if name in ("roll", "flip"):
        return [d % ndim for d in args[-1]]
    return list(range(ndim)) if name in ("as_strided", "slice_scatter", "repeat", "im2col") else []


def _more(grown: Mapping[int, Growth], dim: int, cls: int) -> int:
    return grown.get(dim, {}).get(cls, 0)


def _volume(shape: tuple[int, ...], grown: Mapping[int, Growth], cls: int) -> int:
    return math.prod(size + _more(grown, d, cls) for d, size in enumerate(shape))
