"""What a plan costs: multiply-adds of the merged network, from its widths alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from pleas.layers.layer import CONVOLUTION, LINEAR, Layer, find_layers, output_extents
from pleas.plan.layout import ClassPlan, everyone
from pleas.symmetry import DimUnits, Symmetry

aten = torch.ops.aten
Masks = Mapping[int, Mapping[int, int]]  # class -> owners -> merged units


@dataclass(frozen=True)
class _Side:
    """One axis of a layer: positions that never grow, and positions per unit of every class on it."""

    fixed: int
    classes: Mapping[int, tuple[int, int]]  # class -> (positions per unit, units)

    def counts(self, masks: Masks, everyone: int) -> dict[int, int]:
        """Owners -> merged positions."""
        found = {everyone: self.fixed} if self.fixed else {}
        for c, (per_unit, units) in self.classes.items():
            for mask, count in masks.get(c, {everyone: units}).items():
                found[mask] = found.get(mask, 0) + per_unit * count
        return found


class FlopModel:
    """FLOPs of the merged network's layers from the masks of every class alone, as `BlockLayer` computes them.

    outputs: the plan of the output class where parents do not share their outputs
    """

    def __init__(self, symmetry: Symmetry, parents: int = 1, outputs: ClassPlan | None = None) -> None:
        self._everyone = everyone(parents)
        heads = Counter(outputs.masks.tolist()) if outputs is not None else None
        self._heads: Masks = dict.fromkeys(symmetry.output, heads) if heads else {}
        layers = find_layers(symmetry.program)
        added = symmetry.program.added
        self._layers = [
            (layer, _side(symmetry.axis(layer.weight, 1)), _side(symmetry.axis(layer.weight, 0)), places)
            for layer, places in zip(layers, output_places(symmetry, layers), strict=True)
        ]
        self._products = list(_other_products(symmetry, layers))
        self._touching: dict[int, list[int]] = {}
        for i, sides in enumerate(
            [*(layer[1:3] for layer in self._layers), *(p.sides for p in self._products)]
        ):
            for c in {c for side in sides for c in side.classes}:
                self._touching.setdefault(c, []).append(i)
        self.parent = sum(
            2 * layer.out_units * layer.d_in * places
            for layer, _, _, places in self._layers
            if layer.weight not in added
        ) + sum(product.flops({}, self._everyone) for product in self._products)

    def total(self, masks: Masks, classes: Sequence[int] | None = None) -> int:
        """FLOPs per image of all layers, or of those that touch the given classes; masks: class -> owners -> units,
        for those that are not fused throughout."""
        everything = range(len(self._layers) + len(self._products))
        wanted = everything if classes is None else {i for c in classes for i in self._touching.get(c, ())}
        masks = {**masks, **self._heads}
        return sum(self._one(i, masks) for i in wanted)

    def _one(self, i: int, masks: Masks) -> int:
        if i >= len(self._layers):
            return self._products[i - len(self._layers)].flops(masks, self._everyone)
        layer, inputs, outputs, places = self._layers[i]
        rows = outputs.counts(masks, self._everyone)
        if layer.groups > 1:
            return 2 * places * sum(rows.values()) * layer.d_in
        columns = inputs.counts(masks, self._everyone)
        products = sum(r * c for row, r in rows.items() for column, c in columns.items() if row & column)
        return 2 * places * layer.taps * products

    def depth(self, c: int) -> int:
        """Where in the network the class is first written."""
        return min(self._touching.get(c, [0]))


def _side(units: DimUnits) -> _Side:
    classes = {}
    for c in units.cls.unique().tolist():
        if c >= 0:
            here = units.unit[units.cls == c]
            count = int(here.max()) + 1
            classes[c] = (len(here) // count, count)
    return _Side(int((units.cls < 0).sum()), classes)


@dataclass(frozen=True)
class _Product:
    """A contraction that is not a layer (attention, a computed or transposed weight): all of it is computed, so it
    costs a constant times the product of its dimensions' sizes."""

    factor: int
    sides: tuple[_Side, ...]

    def flops(self, masks: Masks, everyone: int) -> int:
        total = self.factor
        for side in self.sides:
            total *= sum(side.counts(masks, everyone).values())
        return total


def _other_products(symmetry: Symmetry, layers: Sequence[Layer]) -> Iterator[_Product]:
    """Everything FlopCounterMode counts that no layer accounts for."""
    covered = {name for layer in layers for name in layer.nodes}
    for node in symmetry.program.graph.nodes:
        if node.name in covered:
            continue
        if node.target is CONVOLUTION:
            weight, groups = node.args[1].meta["val"].shape, node.args[8]
            places = node.args[0] if node.args[6] else node  # a transposed one costs per input position
            factor = 2 * int(torch.Size(weight[2:]).numel()) * _size(places.meta["val"].shape[2:])
            inputs, outputs = _value_side(symmetry, node.args[0], 1), _value_side(symmetry, node, 1)
            if groups > 1:  # weight[1] is one group's inputs, of a transposed one its outputs
                yield _Product(factor * int(weight[1]), (inputs if node.args[6] else outputs,))
            else:
                yield _Product(factor, (inputs, outputs))
        elif node.target in (
            aten.bmm.default,
            aten.mm.default,
            aten.addmm.default,
            LINEAR,
            aten.baddbmm.default,
        ):
            first = 1 if node.target in (aten.addmm.default, aten.baddbmm.default) else 0
            left = _unmerged(node.args[first], _hint(_batch(symmetry)))
            sides = [_value_side(symmetry, left, d) for d in range(left.meta["val"].dim())]
            yield _Product(2, (*sides, _value_side(symmetry, node, node.meta["val"].dim() - 1)))
        elif node.target is aten.scaled_dot_product_attention.default:
            q, k, _ = node.args[:3]
            # What the result has beside its last dimension: batches broadcast; key and value may have fewer heads.
            rows = [_value_side(symmetry, node, d) for d in range(node.meta["val"].dim() - 1)]
            keys = _value_side(symmetry, k, k.meta["val"].dim() - 2)
            for last in (q, node):  # q k^T is summed over q's last dimension, the second product has v's
                yield _Product(2, (*rows, keys, _value_side(symmetry, last, last.meta["val"].dim() - 1)))


def _unmerged(node: fx.Node, batch: int) -> fx.Node:
    """The value that `node` is a view of, where its batch has swallowed other dimensions (heads, windows): as many
    elements, and their units still stand on dimensions of their own."""
    views = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
    while node.target in views and any(
        not isinstance(size, int) and _hint(size) != batch for size in node.meta["val"].shape
    ):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _size(shape: Sequence[int]) -> int:
    return int(torch.Size([int(s) for s in shape]).numel())


def _value_side(symmetry: Symmetry, node: fx.Node, dim: int) -> _Side:
    """One dimension of an activation; the batch counts as one image."""
    size = node.meta["val"].shape[dim]
    if not isinstance(size, int):
        return _Side(max(1, _hint(size) // _hint(_batch(symmetry))), {})
    units = symmetry.value(node.name, dim)
    return _Side(size, {}) if units is None else _side(units)


def _batch(symmetry: Symmetry) -> int | torch.SymInt:
    return next(n for n in symmetry.program.graph.nodes if n.op == "placeholder").meta["val"].shape[0]


def _hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)  # type: ignore[arg-type]


def output_places(symmetry: Symmetry, layers: Sequence[Layer]) -> list[int]:
    """Per layer, how many output positions one image has, over all its uses."""
    nodes = {node.name: node for node in symmetry.program.graph.nodes}
    totals = []
    for layer in layers:
        total = 0
        for name in layer.nodes:
            shape = nodes[name].args[0].meta["val"].shape
            spatial = output_extents(layer, shape[2:]) if layer.is_convolution else shape[1:-1]
            # Windows of attention stand in the batch dimension: they belong to one image all the same.
            total += _size(spatial) * max(1, _hint(shape[0]) // _hint(_batch(symmetry)))
        totals.append(total)
    return totals
