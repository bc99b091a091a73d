"""Reductions over units, one for every parent: its view of a widened axis.

In every slot of a class exactly one merged unit has parent p among its owners, so that p's view of an axis, the merged
positions that p owns, is as long as the parents' own axis. A layer norm, an RMS norm or a mean over channels is taken
of every view by itself, and a merged unit takes the mean over its owners. Fused everywhere this is the parents' op,
apart everywhere the parents side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from pleas.plan.layout import Layout

aten = torch.ops.aten
Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class View:
    """What one parent sees of a merged axis of m positions, its own having n.

    reads: (n,) the merged positions that it owns, ascending     back: (m,) where each stands among them, else 0
    share: (m,) float64, its share in every merged position
    """

    reads: Tensor
    back: Tensor
    share: Tensor


def views_of(layout: Layout) -> tuple[View, ...]:
    """One for every parent."""
    found = []
    for parent in range(layout.parents):
        owned = layout.masks >> parent & 1
        back = (owned.cumsum(0) - 1) * owned
        found.append(View(owned.nonzero()[:, 0], back, layout.mixing(parent)))
    return tuple(found)


def normalised_by_owner(value: Tensor, layout: Layout, normalise: Norm) -> Tensor:
    """`normalise`, which keeps the shape, of every parent's view of the last dimension; means over the owners."""
    if not layout.widened:
        return normalise(value)
    total = value.new_zeros(())
    for view in views_of(layout):
        own = normalise(value.index_select(-1, view.reads.to(value.device)))
        total = total + own.index_select(-1, view.back.to(value.device)) * view.share.to(value)
    return total


class Constants:
    """Tensors that an edited graph reads and no parent has, by name; equal ones have one name."""

    def __init__(self, taken: Iterable[str]) -> None:
        self.stem = "owners"
        roots = {name.split(".")[0] for name in taken}
        while self.stem in roots:
            self.stem += "_"
        self.tensors: dict[str, Tensor] = {}

    def add(self, graph: fx.Graph, kind: str, value: Tensor) -> fx.Node:
        """A node that reads this value."""
        for name, known in self.tensors.items():
            if known.dtype == value.dtype and torch.equal(known, value):
                return graph.get_attr(name)
        name = f"{self.stem}.{kind}_{len(self.tensors)}"
        self.tensors[name] = value
        return graph.get_attr(name)


def by_owner(
    graph: fx.Graph,
    constants: Constants,
    source: fx.Node,
    axis: tuple[int, Layout],
    dtype: torch.dtype,
    op: Callable[[fx.Node], fx.Node],
    *,
    reduces: bool = False,
) -> fx.Node:
    """Nodes that apply `op` to every parent's view of `source` along an axis and take means over the owners.

    axis:    the dimension, counted from the end, and its layout
    reduces: `op` leaves the dimension with size 1, where its one number is that of every unit
    """
    (dim, layout), total = axis, None
    for view in views_of(layout):
        reads = constants.add(graph, "view", view.reads)
        own = op(graph.call_function(aten.index_select.default, (source, dim, reads)))
        if not reduces:
            back = constants.add(graph, "back", view.back)
            own = graph.call_function(aten.index_select.default, (own, dim, back))
        share = view.share.to(dtype).view(-1, *[1] * (-dim - 1))
        own = graph.call_function(aten.mul.Tensor, (own, constants.add(graph, "share", share)))
        total = own if total is None else graph.call_function(aten.add.Tensor, (total, own))
    assert total is not None
    return total
