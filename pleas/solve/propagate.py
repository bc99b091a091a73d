"""Least squares on what the merged network really feeds its layers.

One walk through the graph in its order, parents and merged network side by side, all images at every step. When the
walk reaches a layer everything before it is solved, so the layer is fitted on inputs

    z = (1 - t) (mean of the owners' inputs) + t (what the merged network gives here),

and its target is the mean of the owners' outputs. Where the output is first of all added to other branches, the target
is the owners' mean of the *sum* less what the merged network's other branches give: a residual stream is put right at
every block instead of drifting. With t = 0 every layer is solved by itself, as PLeaS does (arXiv 2407.02447, eq. 3);
then nothing is corrected. Several values of t are walked together, because the parents' part is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.nn import functional as F

from pleas.errors import InputError, MergeFailed
from pleas.evidence import Evidence
from pleas.layers.layer import (
    BatchNorm,
    Layer,
    batch_dim,
    find_norms,
    is_wide,
    layer_rows,
    output_extents,
    unflatten_weight,
)
from pleas.layers.layer_norm import LayerNorm, find_layer_norms
from pleas.network.average import average, contracted, mean_of_owners
from pleas.network.build import Drawing, block_layer
from pleas.network.module import BlockLayer
from pleas.network.views import normalised_by_owner
from pleas.plan.layout import Layout
from pleas.solve.equations import Equations, KeptRows, LayerSolution, equations_of, prior_of
from pleas.statistics.collect import Progress, count_images, for_each, placed
from pleas.statistics.sampler import PositionSampler
from pleas.symmetry import execute
from pleas.symmetry.program import VIEWS, last_uses

aten = torch.ops.aten
ADD = aten.add.Tensor
REARRANGING = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.clone.default,
    aten.alias.default,
    aten.unsqueeze.default,
    aten.squeeze.dims,
    aten.squeeze.dim,
    aten.roll.default,
)
State = dict[str, Tensor]


@dataclass
class Solved:
    """One merged network after the walk.

    propagate:      the t it was solved with
    state:          its tensors under the names of the graph
    layers:         what the solve of every layer says about itself
    fitted:         parameters of norms that were fitted
    held_out_error: of its outputs on held-out images, squared and relative to the variance of what they should be
    """

    propagate: float
    state: State
    layers: dict[str, LayerSolution] = field(default_factory=dict)
    modules: dict[str, BlockLayer] = field(default_factory=dict)
    fitted: set[str] = field(default_factory=set)
    held_out_error: float = float("nan")


def propagate(
    evidence: Evidence, drawing: Drawing, candidates: Sequence[float], *, progress: Progress | None = None
) -> list[Solved]:
    """Solve every layer for the plan behind `drawing`, once for every candidate t.

    Raises MergeFailed where a solution is not finite, TooFewRows where the images are too few.
    """
    return _Walk(evidence, drawing, candidates, progress).go()


def averaged_state(evidence: Evidence, drawing: Drawing) -> State:
    """The partial merge of every tensor: what least squares starts from."""
    program, weights = evidence.parents.symmetry.program, contracted(evidence.parents.symmetry.program)
    names = (*program.parameters, *program.buffers, *program.added)
    symmetry, layouts = evidence.parents.symmetry, drawing.layouts
    return {name: average(name, evidence.states, symmetry, layouts, weights) for name in names}


@dataclass(frozen=True)
class _Addend:
    """Another branch that is added to a layer's output: `other`, after the layer's output went through `path`."""

    other: fx.Node
    path: tuple[fx.Node, ...]


class _Walk:
    def __init__(
        self, evidence: Evidence, drawing: Drawing, candidates: Sequence[float], progress: Progress | None
    ) -> None:
        parents = evidence.parents
        self.evidence, self.drawing, self.layouts = evidence, drawing, drawing.layouts
        self.parents, self.settings = parents, parents.settings
        self.graph = parents.symmetry.program.graph
        self.progress = progress
        self.chunks = [for_each(batch, parents) for batch in evidence.inputs]
        if not self.chunks:
            raise InputError("no proxy images: least squares need at least one batch. Check the proxy source")
        kind = self.chunks[0][0].dtype
        added = {n: v.to(kind) if v.is_floating_point() else v for n, v in drawing.constants.items()}
        start = {**parents.symmetry.program.constants, **added, **averaged_state(evidence, drawing)}
        self.solved = [Solved(t, dict(start)) for t in candidates]
        self.states = placed(evidence.states, self.chunks[0][0])
        for one in self.solved:
            one.state = placed([one.state], self.chunks[0][0])[0]
        total = count_images(evidence.inputs) or sum(len(chunk[0]) for chunk in self.chunks)
        self.sampler = PositionSampler(self.settings, total)
        self.starts = [0]
        for chunk in self.chunks:
            self.starts.append(self.starts[-1] + len(chunk[0]))
        self.held = held_out(total, self.settings.holdout, self.settings.seed)
        self.shares = evidence.shares
        lanes = parents.count + len(candidates)
        self.values: list[dict[fx.Node, list[Any]]] = [{} for _ in range(lanes)]
        self.exported = next(n.meta["val"].dtype for n in self.graph.nodes if n.op == "placeholder")
        self.back = {new: old for old, new in drawing.became.items()}
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.follows = follows_images(self.graph)
        self.first = {layer.nodes[0]: layer for layer in parents.layers}
        self.norms: dict[str, BatchNorm | LayerNorm] = {
            norm.node: norm
            for norm in (*find_norms(parents.symmetry.program), *find_layer_norms(parents.symmetry.program))
        }
        shared = [layer for layer in parents.layers if len(layer.nodes) > 1]
        self.shared = self._equations_of_shared(shared) if shared else {}

    def go(self) -> list[Solved]:
        dies = last_uses(self.graph)
        steps = len(self.graph.nodes)
        with torch.no_grad():
            for number, node in enumerate(self.graph.nodes):
                if node.op == "placeholder":
                    self._begin(node)
                elif node.op == "output":
                    self._judge(node.args[0])
                    break
                elif node.op == "call_function":
                    self._step(node, dies.get(node, []))
                for dead in dies.get(node, ()):
                    for lane in self.values:
                        lane.pop(dead, None)
                if self.progress is not None and node.name in self.first:
                    self.progress("least squares", number, steps)
        return self.solved

    def _begin(self, node: fx.Node) -> None:
        count = self.parents.count
        for p in range(count):
            self.values[p][node] = [chunk[p] for chunk in self.chunks]
        own = [x[0] if all(y is x[0] for y in x) else mean_of_owners(x, {}) for x in self.chunks]
        for k in range(len(self.solved)):
            self.values[count + k][node] = list(own)

    def _step(self, node: fx.Node, dying: Sequence[fx.Node]) -> None:
        count = self.parents.count
        solves = node.name in self.first or node.name in self.norms
        for p in range(count):
            self._run(p, node, () if solves else dying)
        if node.name in self.first:
            self._solve_layer(self.first[node.name], node)
        elif node.name in self.norms:
            self._solve_norm(self.norms[node.name], node)
        for k in range(len(self.solved)):
            self._run(count + k, node, dying)

    # running one node ---------------------------------------------------------------------------------------------

    def _run(self, lane: int, node: fx.Node, dying: Sequence[fx.Node]) -> None:
        own = self.values[lane]
        own[node] = [None] * len(self.chunks)
        for c in range(len(self.chunks)):
            own[node][c] = self._value(lane, node, c)
            for dead in dying:
                if dead is not node and dead in own:
                    own[dead][c] = None

    def _value(self, lane: int, node: fx.Node, c: int) -> Any:
        count = self.parents.count
        like = self.chunks[c][0]
        if lane < count:
            own, state = self.values[lane], self.states[lane]
            found = {
                n: state[str(n.target)] if n.op == "get_attr" else own[n][c] for n in node.all_input_nodes
            }
            return _called(VIEWS.get(node.target, node.target), node, found, self.exported, like)
        one, template = self.solved[lane - count], self.drawing.became[node]
        if template.op == "call_module":
            source = self.back[template.all_input_nodes[0]]
            return one.modules[str(template.target)](self.values[lane][source][c])
        return self._merged(template, lane, c, like)

    def _merged(self, template: fx.Node, lane: int, c: int, like: Tensor) -> Any:
        """A node of the merged graph; those that only it needs, as the views of owners, are run with it."""
        state = self.solved[lane - self.parents.count].state
        found: dict[fx.Node, Any] = {}
        for n in template.all_input_nodes:
            if n.op == "get_attr":
                found[n] = state[str(n.target)]
            elif n in self.back:
                found[n] = self.values[lane][self.back[n]][c]
            else:
                found[n] = self._merged(n, lane, c, like)
        return _called(template.target, template, found, self.exported, like)

    # one layer ----------------------------------------------------------------------------------------------------

    def _solve_layer(self, layer: Layer, node: fx.Node) -> None:
        inputs, outputs = self.layouts.axis(layer.weight, 1), self.layouts.axis(layer.weight, 0)
        merged = merged_layer(layer, inputs, outputs)
        blocks = self.drawing.blocks[layer.name]
        equations = self.shared.get(layer.name)
        if equations is None:
            prior = prior_of(layer, [layer.matrix(state) for state in self.states], inputs, outputs)
            owners = self._owners_of_heads(layer)
            sets = [[equations_of(merged, prior) for _ in self.solved] for _ in owners]
            addends = _addends(layer, node, self.nodes)
            for c in range(len(self.chunks)):
                for owner, each in zip(owners, sets, strict=True):
                    self._add_rows(layer, merged, node, c, each, addends, owner)
        else:
            owners, sets = [None], [[equations] * len(self.solved)]
        ridge = self.settings.head_ridge if self._is_head(layer) else self.settings.ridge
        for one, *each in zip(self.solved, *sets, strict=True):
            found_by = [sums.solve(blocks, ridge, self.settings.min_rows) for sums in each]
            solution = found_by[0] if len(found_by) == 1 else by_owner(found_by, outputs)
            _check_solution(layer, solution)
            one.layers[layer.name] = solution
            found = unfold(layer, solution, self.evidence.states, outputs)
            one.state |= placed([_like(found, one.state)], self.chunks[0][0])[0]
            if len(blocks) > 1:
                module = block_layer(layer, blocks, self.layouts, one.state)
                one.modules[layer.name] = module.to(self.chunks[0][0].device)

    def _owners_of_heads(self, layer: Layer) -> list[int | None]:
        """The parents whose images count for outputs of their own: every head of several is fitted by itself.

        [None] where all outputs are fitted together.
        """
        alone = self.shares is None or self.settings.heads != "separate" or not self._is_head(layer)
        if alone or is_wide(layer) or layer.groups > 1:
            return [None]
        return list(range(self.parents.count))

    def _is_head(self, layer: Layer) -> bool:
        units = self.parents.symmetry.axis(layer.weight, 0).cls
        return bool(set(units.unique().tolist()) & set(self.parents.symmetry.output))

    def _add_rows(
        self,
        layer: Layer,
        merged: Layer,
        node: fx.Node,
        c: int,
        each: Sequence[Equations | KeptRows],
        addends: Sequence[_Addend],
        owner: int | None = None,
    ) -> None:
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        count = self.parents.count
        target = self._targets(layer, node, c)
        mean = self._mean(source, c) if any(one.propagate < 1 for one in self.solved) else None
        kept = self._kept(c, _first(target, node))
        positions = self._positions(layer, merged, source, c)
        for k, (one, sums) in enumerate(zip(self.solved, each, strict=True)):
            own = self.values[count + k][source][c]
            z = own if mean is None else _mixture(mean, own, one.propagate)
            t = target
            if one.propagate > 0:
                for addend in addends:
                    t = self._corrected(t, addend, node, count + k, c)
            places = None if positions is None else positions[kept]
            rows = rows_of(merged, images_first(z, source)[kept], places)
            wanted = target_rows(merged, images_first(t, node)[kept], places)
            if owner is None:
                sums.add(rows, wanted)
            else:
                assert isinstance(sums, Equations)
                share = self._share(c, _first(target, node))[kept, owner]
                sums.add(rows, wanted, share.repeat_interleave(rows.shape[1] // max(1, len(share))))

    def _targets(self, layer: Layer, node: fx.Node, c: int) -> Tensor:
        """The owners' mean output of a layer, the batch norm behind it included, in the merged layout."""
        found = []
        for p, state in enumerate(self.states):
            y = self.values[p][node][c]
            if layer.norm is not None:
                scale, shift = (v.to(y).view(-1, *(1,) * (y.dim() - 2)) for v in layer.norm.affine(state))
                y = y * scale + shift
            found.append(y)
        return self._mean_of(found, node, c)

    def _mean(self, node: fx.Node, c: int) -> Tensor:
        values = [self.values[p][node][c] for p in range(self.parents.count)]
        if all(x is values[0] for x in values) and not self.layouts.widened(node):
            return values[0]
        return self._mean_of(values, node, c)

    def _mean_of(self, values: Sequence[Tensor], node: fx.Node, c: int) -> Tensor:
        """The owners' mean of one value, by the shares that they have in every image."""
        widened = self.layouts.widened(node)
        if self.shares is None or node not in self.follows:
            return mean_of_owners(values, widened)
        several = isinstance(node.meta["val"], tuple | list)  # a norm, which gives its statistics, too
        dim = batch_dim(node.args[0] if several else node)  # type: ignore[arg-type]
        shape = [-1 if d == dim else 1 for d in range(values[0].dim())]
        share = self._share(c, values[0].shape[dim]).to(values[0])
        return mean_of_owners(values, widened, [column.view(shape) for column in share.unbind(1)])

    def _share(self, c: int, entries: int) -> Tensor:
        """(entries, parents) of the batch dimension, how much each parent counts there."""
        assert self.shares is not None
        share = self.shares[self.starts[c] : self.starts[c + 1]]
        return share.repeat_interleave(max(1, entries // len(share)), 0)

    def _corrected(self, target: Tensor, addend: _Addend, node: fx.Node, lane: int, c: int) -> Tensor:
        """The target plus what another branch lacks of the owners' mean."""
        if addend.other not in self.values[lane]:
            return target  # it comes later in the graph, and is then the one that is corrected
        drift = self._mean(addend.other, c) - self.values[lane][addend.other][c]
        rearranged = [step for step in addend.path if step.target in REARRANGING]
        if not rearranged:
            return target + drift
        places = torch.arange(target.numel(), device=target.device).view(target.shape)
        for step in rearranged:
            places = self._rearranged(places, step, lane, c)
        if places.shape != drift.shape:
            return target
        back = torch.empty_like(target).flatten()
        back[places.flatten()] = drift.flatten().to(back)
        return target + back.view(target.shape)

    def _rearranged(self, places: Tensor, step: fx.Node, lane: int, c: int) -> Tensor:
        template = self.drawing.became[step]
        moved, own = template.args[0], self.values[lane]
        found = {n: places if n is moved else own[self.back[n]][c] for n in template.all_input_nodes}
        args, kwargs = map_arg((template.args, template.kwargs), found.__getitem__)
        return template.target(*args, **kwargs)  # type: ignore[operator]

    def _positions(self, layer: Layer, merged: Layer, source: fx.Node, c: int) -> Tensor | None:
        value = images_first(self.values[0][source][c], source)
        if layer.is_convolution:
            total = int(torch.Size(output_extents(layer, value.shape[2:])).numel())
        else:
            total = int(torch.Size(value.shape[1:-1]).numel())
            widened = images_first(self.values[self.parents.count][source][c], source)
            total = int(torch.Size(widened.shape[1:-1]).numel())
        images = len(self.chunks[c][0])
        return self.sampler(total, merged.d_in, len(value), images, self.starts[c])

    def _kept(self, c: int, entries: int) -> Tensor:
        """Entries of the batch dimension that belong to images which layers are solved on."""
        held = self.held[self.starts[c] : self.starts[c + 1]]
        return (~held).repeat_interleave(max(1, entries // len(held))).nonzero()[:, 0]

    # norms --------------------------------------------------------------------------------------------------------

    def _solve_norm(self, norm: BatchNorm | LayerNorm, node: fx.Node) -> None:
        """A scale and a shift per unit are a grouped layer with one input per group."""
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        dim = 1 if isinstance(norm, BatchNorm) else -1
        outputs = self.layouts.axis(norm.mean if isinstance(norm, BatchNorm) else norm.weight, 0)
        affine = [norm.affine(state) for state in self.states]
        layer = Layer(norm.name, (node.name,), norm.name, norm.name, 1, outputs.old, outputs.old, outputs.old)
        merged = merged_layer(layer, outputs, outputs)
        prior = prior_of(layer, [(scale[:, None], shift) for scale, shift in affine], outputs, outputs)
        each = [Equations(merged, prior) for _ in self.solved]
        for c in range(len(self.chunks)):
            values = [self.values[p][node][c] for p in range(self.parents.count)]
            values = [x[0] if isinstance(x, tuple) else x for x in values]
            target = self._mean_of(values, node, c)
            mean = self._mean(source, c) if any(one.propagate < 1 for one in self.solved) else None
            kept = self._kept(c, _first(target, source))
            for k, (one, sums) in enumerate(zip(self.solved, each, strict=True)):
                own = self.values[self.parents.count + k][source][c]
                z = own if mean is None else _mixture(mean, own, one.propagate)
                if isinstance(norm, LayerNorm):
                    z = normalised_by_owner(z, outputs, partial(_normalised, eps=norm.eps))
                rows = [
                    self._unit_rows(images_first(x, source), dim, merged.channels, c, kept)
                    for x in (z, target)
                ]
                sums.add(*rows)
        for one, sums in zip(self.solved, each, strict=True):
            solution = sums.solve(self.drawing.everything, self.settings.ridge, self.settings.min_rows)
            _check_solution(layer, solution)
            found = norm.unfolded(solution.weight[:, 0], solution.bias, one.state)
            one.fitted |= set(found)
            one.state |= placed([_like(found, one.state)], self.chunks[0][0])[0]

    def _unit_rows(self, value: Tensor, dim: int, units: int, c: int, kept: Tensor) -> Tensor:
        """(units, rows, 1) of a value, batch first, at the sampled positions."""
        rows = value.movedim(dim, -1).reshape(len(value), -1, units)
        positions = self.sampler(rows.shape[1], 1, len(rows), len(self.chunks[c][0]), self.starts[c])
        rows = rows[kept]
        if positions is not None:
            chosen = positions[kept].to(value.device)[:, :, None]
            rows = rows.gather(1, chosen.expand(-1, -1, units))
        return rows.reshape(-1, units).T[:, :, None]

    # layers that are used several times -----------------------------------------------------------------------------

    def _equations_of_shared(self, shared: Sequence[Layer]) -> dict[str, Equations | KeptRows]:
        """A weight that several nodes share is solved once, at its first use, when the merged network's inputs to the
        others are not known yet: it is solved as with t = 0, on the parents' inputs to all of them."""
        found: dict[str, Equations | KeptRows] = {}
        owner = {name: layer for layer in shared for name in layer.nodes}
        for layer in shared:
            inputs, outputs = self.layouts.axis(layer.weight, 1), self.layouts.axis(layer.weight, 0)
            prior = prior_of(layer, [layer.matrix(state) for state in self.states], inputs, outputs)
            found[layer.name] = equations_of(merged_layer(layer, inputs, outputs), prior)
        with torch.no_grad():
            for c in range(len(self.chunks)):
                for node, xs, ys in parents_at(self.graph, self.states, self.chunks[c], owner):
                    layer, sums = owner[node.name], found[owner[node.name].name]
                    source: fx.Node = node.args[0]  # type: ignore[assignment]
                    z = images_first(self._mean_of(xs, source, c), source)
                    t = images_first(self._mean_of(ys, node, c), node)
                    kept = self._kept(c, len(z))
                    total = int(torch.Size(t.shape[2:] if layer.is_convolution else t.shape[1:-1]).numel())
                    places = self.sampler(
                        total, sums.layer.d_in, len(z), len(self.chunks[c][0]), self.starts[c]
                    )
                    places = None if places is None else places[kept]
                    sums.add(rows_of(sums.layer, z[kept], places), target_rows(sums.layer, t[kept], places))
        return found

    # the end --------------------------------------------------------------------------------------------------------

    def _counts(self, output: fx.Node, target: Tensor, shares: Tensor) -> Tensor:
        """How much every number of separate heads counts, (images, outputs): as its owner in that image."""
        masks = self.layouts.value(output, target.dim() - 1).masks
        owner = torch.stack([masks >> p & 1 for p in range(self.parents.count)]).argmax(0)
        return shares[:, owner.to(shares.device)]

    def _judge(self, output: Any) -> None:
        count = self.parents.count
        held = self.held if bool(self.held.any()) else ~self.held
        targets, found = [], [[] for _ in self.solved]
        for c in range(len(self.chunks)):
            here = held[self.starts[c] : self.starts[c + 1]].nonzero()[:, 0]
            targets.append(self._mean(output, c)[here])
            for k, parts in enumerate(found):
                parts.append(self.values[count + k][output][c][here])
        target = torch.cat(targets).double()
        if self.shares is not None and self.settings.heads == "separate":
            counts = self._counts(output, target, self.shares[held].to(target))
            for one, parts in zip(self.solved, found, strict=True):
                one.held_out_error = weighted_error(torch.cat(parts), target, counts)
            return
        spread = (target - target.mean(0)).square().sum().clamp_min(torch.finfo(torch.float64).tiny)
        for one, parts in zip(self.solved, found, strict=True):
            one.held_out_error = float((torch.cat(parts) - target).square().sum() / spread)


def by_owner(solutions: Sequence[LayerSolution], outputs: Layout) -> LayerSolution:
    """Every output of the solution on its owner's images; solutions: one a parent."""
    owner = torch.stack([outputs.masks >> p & 1 for p in range(len(solutions))]).argmax(0)
    rows = torch.arange(len(owner))

    def chosen(name: str) -> Tensor:
        return torch.stack([getattr(one, name) for one in solutions])[owner, rows]

    return replace(
        solutions[0],
        **{name: chosen(name) for name in ("weight", "bias", "mean", "variance", "residual", "target")},
    )


def weighted_error(found: Tensor, target: Tensor, counts: Tensor) -> float:
    """Squared error relative to the target's variance, every number weighted; all three (N, K)."""
    mean = (counts * target).sum(0) / counts.sum(0).clamp_min(torch.finfo(counts.dtype).tiny)
    spread = (counts * (target - mean).square()).sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float((counts * (found - target).square()).sum() / spread)


def follows_images(graph: fx.Graph) -> frozenset[fx.Node]:
    """Values that hold something of every image, and not the same for all."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" or any(n in found for n in node.all_input_nodes):
            first = value[0] if isinstance(value, tuple | list) else value
            if isinstance(first, Tensor):
                found.add(node)
    return frozenset(found)


def held_out(images: int, share: float, seed: int) -> Tensor:
    """(images,) True for those that no layer is solved on: one of every run of 1 / share images, drawn by the seed."""
    run = max(2, round(1 / share))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(run, (-(-images // run),), generator=generator) + run * torch.arange(
        -(-images // run)
    )
    held = torch.zeros(max(images, int(chosen.max()) + 1), dtype=torch.bool)
    held[chosen] = True
    return held[:images]


def merged_layer(layer: Layer, inputs: Layout, outputs: Layout) -> Layer:
    """The layer with the merged network's widths."""
    groups = layer.groups
    if groups > 1:
        groups = outputs.size * groups // layer.out_units
        return replace(
            layer, groups=groups, channels=groups * layer.channels // layer.groups, out_units=outputs.size
        )
    return replace(layer, channels=inputs.size, out_units=outputs.size)


def rows_of(layer: Layer, z: Tensor, positions: Tensor | None) -> Tensor:
    """(groups, rows, d_in) of the layer's inputs, batch first."""
    return layer_rows(layer, z, None if positions is None else positions.to(z.device))


def target_rows(layer: Layer, t: Tensor, positions: Tensor | None) -> Tensor:
    """(groups, rows, outputs of a group) of the layer's outputs (N, units, ...) or (N, ..., units)."""
    t = t.flatten(2).transpose(1, 2) if layer.is_convolution else t.reshape(len(t), -1, t.shape[-1])
    if positions is not None:
        t = t.gather(1, positions.to(t.device)[:, :, None].expand(-1, -1, t.shape[-1]))
    return t.flatten(0, 1).unflatten(1, (layer.groups, -1)).transpose(0, 1)


def unfold(
    layer: Layer, solution: LayerSolution, states: Sequence[Mapping[str, Tensor]], outputs: Layout
) -> dict[str, Tensor]:
    """The solved affine map as the module's own tensors: batch norm is unfolded with the statistics that its rows had.

    Any non-zero scale gives the same composed map; the parents' mean scale keeps the weights in their usual
    range.
    """
    norm, weight, bias = layer.norm, solution.weight, solution.bias
    out: dict[str, Tensor] = {}
    if norm is not None:
        scale = _merged_scale(norm, states, outputs)
        weight = weight / scale[:, None]
        mean, var = (solution.mean - bias) / scale, solution.variance / scale.square()
        if norm.weight is None:  # no affine of its own: its statistics must carry the map
            var, mean = (scale.square().reciprocal() - norm.eps).clamp_min(0), -bias / scale
        else:
            out[norm.weight] = scale * (var + norm.eps).sqrt()
        if norm.bias is not None:
            out[norm.bias] = bias + scale * mean
        out[norm.mean], out[norm.var] = mean, var
        if layer.bias is not None:
            out[layer.bias] = torch.zeros_like(bias)
    elif layer.bias is not None:
        out[layer.bias] = bias
    out[layer.weight] = unflatten_weight(weight, layer.kernel)
    return out


def _merged_scale(norm: BatchNorm, states: Sequence[Mapping[str, Tensor]], outputs: Layout) -> Tensor:
    """A safe scale per merged unit: the owners' mean magnitude, 1 where that is nil (a dead unit)."""
    scale = torch.zeros(outputs.size, dtype=torch.float64)
    for parent, state in enumerate(states):
        own = norm.affine(state)[0].abs().cpu()
        scale += outputs.mixing(parent) * own[outputs.sources[parent].clamp_max(len(own) - 1)]
    return torch.where(scale > 1e-6 * scale.max(), scale, 1.0)


def _addends(layer: Layer, node: fx.Node, nodes: Mapping[str, fx.Node]) -> tuple[_Addend, ...]:
    """What is added to the layer's output before anything else happens to it; rearranging does not count."""
    here, path, found = node, [], []
    if layer.norm is not None:
        here = nodes[layer.norm.node]
        taken = [user for user in here.users if user.args[1:] == (0,)]
        if len(taken) != 1:
            return ()
        here = taken[0]
    while len(here.users) == 1:
        user = next(iter(here.users))
        if user.target is ADD and not user.kwargs and _alike(user):
            other = user.args[1] if user.args[0] is here else user.args[0]
            if other is here:
                break
            found.append(_Addend(other, tuple(path)))  # type: ignore[arg-type]
        elif user.target not in REARRANGING or user.args[0] is not here:
            break
        path.append(user)
        here = user
    return tuple(found)


def _alike(node: fx.Node) -> bool:
    """Whether both terms of a sum are activations of one shape."""
    if not all(isinstance(x, fx.Node) and x.op != "get_attr" for x in node.args[:2]):
        return False
    shapes = [x.meta["val"].shape for x in node.args[:2] if isinstance(x.meta["val"], Tensor)]  # type: ignore[union-attr]
    return (
        len(shapes) == 2
        and len(shapes[0]) == len(shapes[1])
        and all(str(a) == str(b) for a, b in zip(*shapes, strict=True))
    )


def parents_at(
    graph: fx.Graph, states: Sequence[State], inputs: Sequence[Tensor], wanted: Mapping[str, Layer]
) -> Iterator[tuple[fx.Node, list[Tensor], list[Tensor]]]:
    """The wanted nodes in order, each with every parent's input and output there."""
    found: list[tuple[fx.Node, list[Tensor], list[Tensor]]] = []
    reads: dict[str, list[Tensor]] = {}

    def visit(node: fx.Node, args: list[tuple], _: list[dict]) -> None:
        if node.name in wanted:
            reads[node.name] = [arguments[0] for arguments in args]

    def seen(node: fx.Node, values: list[Any]) -> None:
        if node.name in wanted:
            found.append((node, reads.pop(node.name), list(values)))

    execute(graph, states, inputs, visit, seen)
    yield from found


def _called(
    target: Any, node: fx.Node, found: Mapping[fx.Node, Any], exported: torch.dtype, like: Tensor
) -> Any:
    """What an op gives; export writes down its own device and precision, and those of the images are followed."""
    args, kwargs = map_arg((node.args, node.kwargs), found.__getitem__)
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": like.device}
    if kwargs.get("dtype") is exported:
        kwargs = {**kwargs, "dtype": like.dtype}
    return target(*args, **kwargs)


def _normalised(value: Tensor, eps: float) -> Tensor:
    return F.layer_norm(value, value.shape[-1:], None, None, eps)


def _mixture(mean: Tensor, own: Tensor, t: float) -> Tensor:
    if t == 0:
        return mean
    return own if t == 1 else torch.lerp(mean, own, t)


def images_first(value: Tensor, node: fx.Node) -> Tensor:
    return value.movedim(batch_dim(node), 0)


def _first(value: Tensor, node: fx.Node) -> int:
    return value.shape[batch_dim(node)]


def _like(found: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(state[name].dtype) for name, value in found.items()}


def _check_solution(layer: Layer, solution: LayerSolution) -> None:
    if not bool(torch.isfinite(solution.weight).all() and torch.isfinite(solution.residual).all()):
        raise MergeFailed(
            f"layer '{layer.name}': the least-squares solution is not finite. "
            "Raise the ridge, or look at the proxies with `datafree diagnose`."
        )
