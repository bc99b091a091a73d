"""Which units to fuse and which to keep apart under a compute budget (design 4).

Within a class the least similar pairs are kept apart first. How many, class by class, follows from what
fusing costs: a fused pair of units replaces `a` and `b` by `f = (a + b) / 2` and so loses `d = (a - b) / 2`;
its price, read off the statistics, is the part of the readers' outputs that `d` explains and no fused unit
can. Widths follow a greedy path over classes, the pairs that save most predicted error per multiply-add
first. Plans of growing budgets are prefixes of one path, so more budget never predicts more error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from pleas.errors import InputError
from pleas.layers import CONVOLUTION, LINEAR, Layer, find_layers, output_extents
from pleas.layout import ClassPlan
from pleas.matching import activation_similarities, similarity_of_pairs
from pleas.rows import is_wide, position_costs
from pleas.settings import MergeSettings
from pleas.statistics import Statistics
from pleas.symmetry import DimUnits, Permutation, Symmetry, permute_state, position_maps, state_of

aten = torch.ops.aten
CHUNKS = 32  # a class is kept apart in steps of 1/32 of its units


@dataclass(frozen=True)
class FusingCosts:
    """What is known of every matched pair of the widenable classes, each {class: (units,)}.

    error:      predicted relative error of fusing the pair: decides how many of a class are kept apart
    similarity: correlation of the two units, summed over the class's axes: decides which
    """

    error: Mapping[int, Tensor]
    similarity: Mapping[int, Tensor]

    def order(self) -> dict[int, Tensor]:
        """Units of every class, those to keep apart first: the least similar; of equals, the dearest to fuse."""
        dearest = {c: error.argsort(descending=True, stable=True) for c, error in self.error.items()}
        return {c: first[self.similarity[c][first].argsort(stable=True)] for c, first in dearest.items()}


@dataclass(frozen=True)
class Plan:
    """Fused and kept-apart units of every class, and what that costs.

    flops:           of the merged network's layers, per image (2 per multiply-add)
    parent_flops:    of one parent's layers
    share_apart:     of the units that can be kept apart, those that are
    saved, at_stake: predicted relative error that keeping units apart avoids, and what fusing everything
        would cost
    """

    classes: Mapping[int, ClassPlan]
    flops: int
    parent_flops: int
    share_apart: float
    saved: float
    at_stake: float

    @property
    def ratio(self) -> float:
        """Multiply-adds relative to one parent."""
        return self.flops / self.parent_flops

    @property
    def predicted_error(self) -> float:
        """Relative error of the readers' outputs that fusing is predicted to cause, summed over layers."""
        return self.at_stake - self.saved


def make_plan(
    symmetry: Symmetry,
    statistics: Statistics,
    matching: Permutation,
    a: nn.Module,
    b: nn.Module,
    settings: MergeSettings,
    *,
    budget: float | None = None,
    apart: float | None = None,
    costs: FusingCosts | None = None,
) -> Plan:
    """A plan for a budget (multiply-adds relative to one parent, in [1, 2]) or for a fraction of every class
    kept apart.

    costs: what `fusing_costs` gives, for callers that make several plans.

    Classes that cannot be widened stay fused. With separate heads the output class is two heads side by side;
    a budget below what that alone costs gives the narrowest network.
    """
    if (budget is None) == (apart is None):
        raise InputError(
            "give exactly one of budget (multiply-adds, 1.0 to 2.0) and apart (fraction kept apart, 0 to 1)"
        )
    if budget is not None and not 1 <= budget <= 2:
        raise InputError(f"budget = {budget}: must lie between 1.0 (one parent) and 2.0 (both side by side)")
    if apart is not None and not 0 <= apart <= 1:
        raise InputError(f"apart = {apart}: must lie between 0 (all units fused) and 1 (none)")
    if costs is None:
        costs = fusing_costs(symmetry, statistics, matching, a, b)
    order, errors = costs.order(), costs.error
    model = FlopModel(symmetry, _head_sizes(symmetry, a, b, settings))
    widths = dict.fromkeys(errors, 0)
    if apart is not None:
        widths = _uniform(errors, apart)
    elif budget is not None:
        # Rewrites add a little of their own: both parents side by side are within a budget of 2 all the same.
        limit = budget * model.parent if budget < 2 else 2 * max(model.parent, model.total(widths))
        for candidate in _path(errors, order, model, settings.allocation):
            if model.total(candidate) > limit:
                break
            widths = dict(candidate)
    return _plan(symmetry, errors, order, widths, model)


def _plan(
    symmetry: Symmetry,
    costs: Mapping[int, Tensor],
    order: Mapping[int, Tensor],
    widths: Mapping[int, int],
    model: FlopModel,
) -> Plan:
    plans: dict[int, ClassPlan] = {}
    for index, unit_class in enumerate(symmetry.classes):
        ranked = order.get(index, torch.arange(unit_class.size))
        m = widths.get(index, 0)
        heads = model.heads if index in symmetry.output else None
        plans[index] = ClassPlan(ranked[m:].sort().values, ranked[:m].sort().values, heads)
    saved = sum(float(cost[order[c][: widths[c]]].sum()) for c, cost in costs.items())
    at_stake = sum(float(cost.sum()) for cost in costs.values())
    share = sum(widths.values()) / max(1, sum(len(cost) for cost in costs.values()))
    return Plan(plans, model.total(widths), model.parent, share, saved, at_stake)


def _head_sizes(
    symmetry: Symmetry, a: nn.Module, b: nn.Module, settings: MergeSettings
) -> tuple[int, int] | None:
    """Outputs of A and of B when each keeps its own head."""
    if settings.heads == "shared":
        return None
    if len(symmetry.output) != 1:
        raise InputError("separate heads need a model with one output layer; use heads='shared'")
    axis = symmetry.classes[symmetry.output[0]].axes[0]
    return tuple(state_of(symmetry.program, m)[axis.tensor].shape[axis.dim] for m in (a, b))  # type: ignore[return-value]


def _uniform(costs: Mapping[int, Tensor], share: float) -> dict[int, int]:
    return {c: int(share * len(cost) + 0.5) for c, cost in costs.items()}


def _path(
    costs: Mapping[int, Tensor], order: Mapping[int, Tensor], model: FlopModel, allocation: str
) -> Iterator[dict[int, int]]:
    """Ever wider widths (units kept apart per class), from nothing apart to everything."""
    widths = dict.fromkeys(costs, 0)
    yield dict(widths)
    if allocation == "uniform":
        steps = 8 * max((len(cost) for cost in costs.values()), default=0)
        for step in range(1, steps + 1):
            yield _uniform(costs, step / steps)
    elif allocation == "zip":
        for c in sorted(costs, key=model.depth, reverse=True):
            for m in range(1, len(costs[c]) + 1):
                widths[c] = m
                yield dict(widths)
    else:
        ranked = {c: cost[order[c]] for c, cost in costs.items()}
        while open_classes := [c for c in costs if widths[c] < len(costs[c])]:
            best = max(open_classes, key=lambda c: _gain(c, ranked[c], widths, model))
            widths[best] = min(len(costs[best]), widths[best] + _chunk(costs[best]))
            yield dict(widths)


def _chunk(cost: Tensor) -> int:
    return max(1, len(cost) // CHUNKS)


def _gain(c: int, ranked: Tensor, widths: Mapping[int, int], model: FlopModel) -> float:
    """Predicted error saved per FLOP by the next chunk of this class."""
    m = min(len(ranked), widths[c] + _chunk(ranked))
    saved = float(ranked[widths[c] : m].sum())
    return saved / max(1, model.total({**widths, c: m}, [c]) - model.total(widths, [c]))


# --- what a plan costs ---


@dataclass(frozen=True)
class _Side:
    """One axis of a layer: positions that never grow, and positions per unit of every class on it."""

    fixed: int
    classes: Mapping[int, tuple[int, int]]  # class -> (positions per unit, units)

    def counts(self, widths: Mapping[int, int], heads: Mapping[int, tuple[int, int]]) -> tuple[int, int, int]:
        """(fused, A-only, B-only) positions."""
        fused, a, b = self.fixed, 0, 0
        for c, (per_unit, units) in self.classes.items():
            if c in heads:
                a, b = a + heads[c][0], b + heads[c][1]
            else:
                m = widths.get(c, 0)
                fused, a, b = fused + per_unit * (units - m), a + per_unit * m, b + per_unit * m
        return fused, a, b


class FlopModel:
    """FLOPs of the merged network's layers from widths alone, as `BlockLayer` computes them."""

    def __init__(self, symmetry: Symmetry, heads: tuple[int, int] | None) -> None:
        self.heads = heads
        self._heads = dict.fromkeys(symmetry.output, heads) if heads else {}
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
        ) + sum(product.flops({}, {}) for product in self._products)

    def total(self, widths: Mapping[int, int], classes: Sequence[int] | None = None) -> int:
        """FLOPs per image of all layers, or of those that touch the given classes."""
        everything = range(len(self._layers) + len(self._products))
        wanted = everything if classes is None else {i for c in classes for i in self._touching.get(c, ())}
        return sum(self._one(i, widths) for i in wanted)

    def _one(self, i: int, widths: Mapping[int, int]) -> int:
        if i >= len(self._layers):
            return self._products[i - len(self._layers)].flops(widths, self._heads)
        layer, inputs, outputs, places = self._layers[i]
        fused, a, b = outputs.counts(widths, self._heads)
        if layer.groups > 1:
            return 2 * places * (fused + a + b) * layer.d_in
        seen, seen_a, seen_b = inputs.counts(widths, self._heads)
        products = fused * (seen + seen_a + seen_b) + a * (seen + seen_a) + b * (seen + seen_b)
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

    def flops(self, widths: Mapping[int, int], heads: Mapping[int, tuple[int, int]]) -> int:
        total = self.factor
        for side in self.sides:
            total *= sum(side.counts(widths, heads))
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


# --- what fusing costs ---


def fusing_costs(
    symmetry: Symmetry, statistics: Statistics, matching: Permutation, a: nn.Module, b: nn.Module
) -> FusingCosts:
    """Similarity of the matched pairs of every widenable class, and the predicted error of fusing them.

    For a reader with weights V = [W_A; W_B] let R = Cov(d | f) be what the fused inputs leave of d = (a - b)
    / 2. Fusing unit u costs tr(V R_u R_uu^-1 R_u^T V^T): the error one gains by handing the reader d_u in
    addition, relative to the variance of its outputs. Costs add up over the readers of a class.
    """
    program = symmetry.program
    widenable = [i for i, c in enumerate(symmetry.classes) if c.widenable and i not in symmetry.output]
    costs = {i: torch.zeros(symmetry.classes[i].size, dtype=torch.float64) for i in widenable}
    state_a, state_b = state_of(program, a), permute_state(symmetry, state_of(program, b), matching)
    maps = position_maps(symmetry, matching)
    for layer in find_layers(program):
        units = symmetry.axis(layer.weight, 1)
        readable = [c for c in units.cls.unique().tolist() if c in costs]
        if not readable:
            continue
        weights = [layer.matrix(state)[0] for state in (state_a, state_b)]
        if layer.groups > 1:
            _add_grouped_costs(layer, units, statistics, weights, costs)
            continue
        alignment = maps.get((layer.weight, 1), torch.arange(layer.channels))
        if is_wide(layer):
            per_position = position_costs(statistics.rows[layer.name], weights[0], weights[1], alignment)
            for c in readable:
                here = units.cls == c
                costs[c].index_add_(0, units.unit[here], per_position[here])
            continue
        residual, variance, scale = _lost_covariance(layer, statistics, weights, alignment)
        for c in readable:
            index = _positions_of_units(units, c, symmetry.classes[c].size, layer)
            costs[c] += _cost_of_units(torch.cat(weights), residual, variance, index) / scale
    similarities = activation_similarities(symmetry, statistics, a, b)
    alike = {
        c: similarity_of_pairs(symmetry.classes[c], symmetry.classes[c], matching[c], similarities)
        for c in costs
    }
    return FusingCosts(costs, alike)


def _lost_covariance(
    layer: Layer, statistics: Statistics, weights: Sequence[Tensor], alignment: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Cov(d | f), (d_in, d_in), the variance of the fused inputs, (d_in,), and that of both parents' outputs."""
    covariance = statistics.joint[layer.name].covariance[0]
    half = layer.d_in
    own_b = half + (torch.arange(layer.taps)[:, None] * layer.channels + alignment).flatten()
    aa, ab, bb = covariance[:half, :half], covariance[:half, own_b], covariance[own_b][:, own_b]
    ff, fd, dd = (aa + ab + ab.T + bb) / 4, (aa - ab + ab.T - bb) / 4, (aa - ab - ab.T + bb) / 4
    scale = sum(float(((w @ m) * w).sum()) for w, m in zip(weights, (aa, bb), strict=True))
    damping = 1e-3 * ff.diagonal().mean().clamp_min(torch.finfo(ff.dtype).tiny)
    factor = torch.linalg.cholesky(ff + damping * torch.eye(half, dtype=ff.dtype))
    lost = dd - fd.T @ torch.cholesky_solve(fd, factor)
    return lost, ff.diagonal(), max(scale, torch.finfo(ff.dtype).tiny)


def _positions_of_units(units: DimUnits, c: int, size: int, layer: Layer) -> Tensor:
    """(units, positions per unit * taps) rows of the canonical layout that belong to each unit."""
    here = (units.cls == c).nonzero()[:, 0]
    order = torch.argsort(units.unit[here], stable=True)
    channels = here[order].view(size, -1)
    return (torch.arange(layer.taps) * layer.channels + channels[:, :, None]).flatten(1)


def _cost_of_units(weights: Tensor, residual: Tensor, variance: Tensor, index: Tensor) -> Tensor:
    projected = (weights @ residual)[:, index].movedim(1, 0)  # (units, outputs, k)
    own = residual[index[:, :, None], index[:, None, :]]  # (units, k, k)
    # What is lost of nearly equal units is rounding: below a millionth of their variance it counts as nothing.
    floor = (1e-6 * variance.mean()).clamp_min(torch.finfo(own.dtype).tiny)
    damping = torch.maximum(1e-3 * own.diagonal(dim1=1, dim2=2).mean(1), floor)
    factor = torch.linalg.cholesky(own + torch.diag_embed(damping[:, None].expand(index.shape)))
    whitened = torch.linalg.solve_triangular(factor, projected.mT, upper=False)
    return whitened.square().sum((1, 2))


def _add_grouped_costs(
    layer: Layer,
    units: DimUnits,
    statistics: Statistics,
    weights: Sequence[Tensor],
    costs: dict[int, Tensor],
) -> None:
    """A grouped layer reads each unit in its own group alone: everything d explains there is lost."""
    covariance = statistics.grouped[layer.name].covariance
    half = layer.d_in
    aa, ab, bb = covariance[:, :half, :half], covariance[:, :half, half:], covariance[:, half:, half:]
    parts = [w.unflatten(0, (layer.groups, -1)) for w in weights]
    ff, fd, dd = (aa + ab + ab.mT + bb) / 4, (aa - ab + ab.mT - bb) / 4, (aa - ab - ab.mT + bb) / 4
    tiny = torch.finfo(ff.dtype).tiny
    damping = (1e-3 * ff.diagonal(dim1=1, dim2=2).mean(1)).clamp_min(tiny)
    factor = torch.linalg.cholesky(ff + torch.diag_embed(damping[:, None].expand(-1, half)))
    residual = dd - fd.mT @ torch.cholesky_solve(fd, factor)
    lost = torch.stack([((w @ residual) * w).sum((1, 2)) for w in parts]).sum(0).clamp_min(0)
    scale = sum(float(((w @ m) * w).sum()) for w, m in zip(parts, (aa, bb), strict=True))
    first = torch.arange(layer.groups) * (layer.channels // layer.groups)
    for c in costs:
        mine = units.cls[first] == c
        costs[c].index_add_(0, units.unit[first][mine], lost[mine] / max(scale, tiny))
