"""Two parents become one network: `merge`, and the stages it is made of."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from pleas.average import average, contracted
from pleas.errors import ArchitectureMismatch, InputError, MergeFailed, NonFinite
from pleas.layer_norm import find_layer_norms, fit_layer_norm
from pleas.layers import BatchNorm, Layer, find_layers, find_norms, unflatten_weight
from pleas.layout import FUSED, Layout
from pleas.matching import match
from pleas.module import BlockLayer, build_network, flops
from pleas.moments import Moments
from pleas.plan import Plan, make_plan
from pleas.rows import is_wide, solve_rows
from pleas.settings import MergeSettings
from pleas.solve import (
    Block,
    LayerSolution,
    blocks_of,
    mixing,
    pose,
    solve,
    solve_grouped,
)
from pleas.statistics import Batch, Progress, Statistics, collect, collect_grouped
from pleas.symmetry import Permutation, Symmetry, logits_of, permute_state, position_maps, state_of, trace
from pleas.widen import Layouts, edit_graph

DEFAULTS = MergeSettings()
WIDENING_TOLERANCE = 1e-3  # relative, in single precision


@dataclass(frozen=True)
class LayerEvidence:
    """What the solve of one layer says about itself.

    residual:  predicted E|W z + b - t|^2 over the target's variance, summed over output units
    rows, unknowns: rows behind the moments, and unknowns per output unit
    dead:      input units without variance on the proxies; they keep the partial-merge weights
    """

    name: str
    residual: float
    rows: int
    unknowns: int
    dead: tuple[int, ...]


@dataclass(frozen=True)
class MergeResult:
    """The merged module and the evidence for it.

    flops and parent_flops are measured on the modules by FlopCounterMode; averaged names the tensors that no
    least squares covers and that were averaged over matched units.
    """

    module: nn.Module
    plan: Plan
    matching: Permutation
    symmetry: Symmetry
    layers: tuple[LayerEvidence, ...]
    flops: int
    parent_flops: int
    parameters: int
    averaged: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def ratio(self) -> float:
        """Multiply-adds relative to one parent, measured."""
        return self.flops / self.parent_flops

    @property
    def mean_residual(self) -> float:
        """Mean over layers of the predicted relative residual."""
        return sum(layer.residual for layer in self.layers) / max(1, len(self.layers))


def merge(
    a: nn.Module,
    b: nn.Module,
    inputs: Iterable[Batch],
    *,
    budget: float | None = None,
    apart: float | None = None,
    settings: MergeSettings = DEFAULTS,
    example: Tensor | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge two networks of one architecture on proxy inputs (PLeaS, arXiv 2407.02447, with closed-form
    solves).

    inputs:  a collection (read up to twice) of batches of normalised images (N, C, H, W); batches of pairs
             (x_a, x_b) where the parents normalise differently
    budget:  multiply-adds of the result relative to one parent, 1.0 to 2.0; or
    apart:   fraction of the units of every class kept apart, 0 to 1
    For several budgets call the stages (`trace`, `collect`, `match`, `make_plan`, `assemble`): one pass
    serves them all.
    """
    if not hasattr(inputs, "__len__") and iter(inputs) is inputs:
        raise InputError(
            "inputs is a one-shot iterator; give a list of batches or a DataLoader: "
            "it is read once for its shape and up to twice for the statistics"
        )
    if example is None:
        first = next(iter(inputs))
        example = (first if isinstance(first, Tensor) else first[0])[:2]
    check_parents(a, b, settings)
    symmetry = trace(a, example)
    statistics = collect(symmetry, a, b, inputs, settings, progress=progress)
    matching = match(symmetry, statistics, a, b, settings)
    statistics = collect_grouped(symmetry, statistics, matching, a, b, inputs, settings, progress=progress)
    plan = make_plan(symmetry, statistics, matching, a, b, settings, budget=budget, apart=apart)
    return assemble(symmetry, statistics, matching, plan, a, b, settings, example=example)


def check_parents(a: nn.Module, b: nn.Module, settings: MergeSettings = DEFAULTS) -> None:
    """Raise unless the parents are one architecture with finite weights; with separate heads their last
    tensors may differ in the number of outputs. Says which tensors differ."""
    states = [m.state_dict() for m in (a, b)]
    only = [sorted(set(x) - set(y)) for x, y in (states, states[::-1])]
    different = [
        f"{name}: {tuple(value.shape)} in A, {tuple(states[1][name].shape)} in B"
        for name, value in states[0].items()
        if name in states[1] and value.shape != states[1][name].shape
    ]
    same_rest = all(len(line.split("(")) == 3 for line in different)
    if (
        settings.heads == "separate"
        and not any(only)
        and same_rest
        and len(different) <= 2
        and _only_first_dim(states)
    ):
        different = []
    if any(only) or different:
        lines = [f"only in A: {', '.join(only[0][:5])}"] * bool(only[0])
        lines += [f"only in B: {', '.join(only[1][:5])}"] * bool(only[1])
        lines += different[:8]
        hint = " If only the head differs, ask for separate heads." if different and not any(only) else ""
        raise ArchitectureMismatch(
            "the parents are not one architecture; tensors that differ:\n  "
            + "\n  ".join(lines)
            + "\nMerge two checkpoints of "
            f"the same model definition.{hint}"
        )
    for parent, state in zip("ab", states, strict=True):
        for name, value in state.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise NonFinite(
                    f"parent {parent}: weights '{name}' hold NaN or infinity; the checkpoint is damaged"
                )


def _only_first_dim(states: list[dict[str, Tensor]]) -> bool:
    return all(
        value.shape[1:] == states[1][name].shape[1:] and value.dim() == states[1][name].dim()
        for name, value in states[0].items()
    )


def assemble(
    symmetry: Symmetry,
    statistics: Statistics,
    matching: Permutation,
    plan: Plan,
    a: nn.Module,
    b: nn.Module,
    settings: MergeSettings,
    *,
    example: Tensor,
    least_squares: bool = True,
) -> MergeResult:
    """Solve every layer for a plan and build the merged module.

    least_squares=False leaves the partial-merge weights as they are: the permutation-only baseline at any
    budget. Raises MergeFailed when the saved module's FLOPs are not the plan's or a solution is not finite.
    """
    program = symmetry.program
    layers = find_layers(program)
    layouts = Layouts(symmetry, plan.classes)
    states = (state_of(program, a), permute_state(symmetry, state_of(program, b), matching))
    maps = position_maps(symmetry, matching)
    merged: dict[str, Tensor] = {}
    evidence: list[LayerEvidence] = []
    blocks: dict[str, tuple[Block, ...]] = {}
    if least_squares:
        for layer in layers:
            inputs, outputs = layouts.axis(layer.weight, 1), layouts.axis(layer.weight, 0)
            solution = _solve_layer(layer, statistics, states, maps, inputs, outputs, settings)
            evidence.append(_evidence(layer, solution))
            merged |= _unfold(layer, solution, states, outputs)
        for norm in find_norms(program):
            layout = layouts.axis(norm.mean, 0)
            merged |= _solve_norm(norm, statistics.units[norm.name], states, maps, layout, settings.ridge)
        if plan.share_apart > 0:
            merged |= _fit_layer_norms(layouts, statistics, states, plan.share_apart, settings.ridge)
    for layer in layers:
        blocks[layer.name] = blocks_of(layer, layouts.axis(layer.weight, 1), layouts.axis(layer.weight, 0))
    averaged = [
        name for name in (*program.parameters, *program.buffers, *program.added) if name not in merged
    ]
    weights = contracted(program)
    for name in averaged:
        merged[name] = average(name, states, symmetry, layouts, weights)
    module = _build(symmetry, layouts, layers, blocks, merged, plan, a)
    if any(p.share_apart > 0 for p in plan.classes.values()):
        _check_widening(symmetry, layouts, layers, blocks, weights, plan, a, example)
    return _finish(
        module,
        symmetry,
        plan,
        matching,
        evidence,
        [n for n in averaged if n in program.parameters],
        a,
        example,
    )


def _solve_layer(
    layer: Layer,
    statistics: Statistics,
    states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    maps: Mapping[tuple[str, int], Tensor],
    inputs: Layout,
    outputs: Layout,
    settings: MergeSettings,
) -> LayerSolution:
    a, b = (layer.matrix(state) for state in states)
    if layer.groups > 1:
        moments = statistics.grouped[layer.name]
        return solve_grouped(layer, moments, a, b, inputs, outputs, settings.ridge, settings.min_rows)
    alignment = maps.get((layer.weight, 1), torch.arange(layer.channels))
    blocks = blocks_of(layer, inputs, outputs)
    if is_wide(layer):
        rows = statistics.rows[layer.name]
        return solve_rows(
            layer, rows, a, b, alignment, inputs, outputs, blocks, settings.ridge, settings.min_rows
        )
    problem = pose(layer, statistics.joint[layer.name], a, b, alignment, inputs, outputs)
    return solve(layer, problem, blocks, settings.ridge, settings.min_rows)


def _evidence(layer: Layer, solution: LayerSolution) -> LayerEvidence:
    if not bool(torch.isfinite(solution.weight).all() and torch.isfinite(solution.residual).all()):
        raise MergeFailed(
            f"layer '{layer.name}': the least-squares solution is not finite. "
            "Raise the ridge, or look at the proxies with `datafree diagnose`."
        )
    return LayerEvidence(
        layer.name,
        solution.relative_residual,
        solution.rows,
        solution.weight.shape[1],
        tuple(solution.dead.tolist()),
    )


def _unfold(
    layer: Layer, solution: LayerSolution, states: tuple[Mapping[str, Tensor], ...], outputs: Layout
) -> dict[str, Tensor]:
    """The solved affine map as the module's own tensors: batch norm is unfolded with the statistics the
    moments predict.

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


def _merged_scale(norm: BatchNorm, states: tuple[Mapping[str, Tensor], ...], outputs: Layout) -> Tensor:
    """A safe scale per merged unit: the parents' mean magnitude, 1 where that is nil (a dead unit)."""
    scales = [
        norm.affine(state)[0].abs()[outputs.source.clamp_max(len(state[norm.mean]) - 1)] for state in states
    ]
    mix_a, mix_b = mixing(outputs)
    scale = mix_a * scales[0] + mix_b * scales[1]
    return torch.where(scale > 1e-6 * scale.max(), scale, 1.0)


def _solve_norm(
    norm: BatchNorm,
    moments: Moments,
    states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    maps: Mapping[tuple[str, int], Tensor],
    layout: Layout,
    ridge: float,
) -> dict[str, Tensor]:
    """A batch norm that stands alone, as the diagonal least-squares problem it is: per merged unit one scale
    and one shift that map the mean of the parents' inputs to the mean of their outputs. Units kept apart keep
    their parent's map."""
    units = len(states[0][norm.mean])
    own_b = units + maps.get((norm.mean, 0), torch.arange(units))[layout.source]
    covariance, mean = moments.covariance[0], moments.mean[0]
    (scale_a, shift_a), (scale_b, shift_b) = (
        tuple(part[layout.source] for part in norm.affine(state)) for state in states
    )
    mix_a, mix_b = mixing(layout)
    var_a, var_b = covariance.diagonal()[layout.source], covariance.diagonal()[own_b]
    cov = covariance[layout.source, own_b]
    var_z = mix_a**2 * var_a + 2 * mix_a * mix_b * cov + mix_b**2 * var_b
    cov_tz = (
        mix_a**2 * scale_a * var_a + mix_a * mix_b * (scale_a + scale_b) * cov + mix_b**2 * scale_b * var_b
    )
    prior = mix_a * scale_a + mix_b * scale_b
    damping = ridge * torch.where(var_z.mean() > 0, var_z.mean(), 1.0)
    scale = torch.where(layout.kind == FUSED, (cov_tz + damping * prior) / (var_z + damping), prior)
    mean_z = mix_a * mean[layout.source] + mix_b * mean[own_b]
    mean_t = mix_a * (scale_a * mean[layout.source] + shift_a) + mix_b * (scale_b * mean[own_b] + shift_b)
    shift = torch.where(layout.kind == FUSED, mean_t - scale * mean_z, mix_a * shift_a + mix_b * shift_b)
    if norm.weight is None or norm.bias is None:
        raise InputError(
            f"batch norm '{norm.name}' has no affine parameters and stands alone: it cannot be merged"
        )
    return {
        norm.weight: scale * (var_z + norm.eps).sqrt(),
        norm.bias: shift + scale * mean_z,
        norm.mean: mean_z,
        norm.var: var_z,
    }


def _fit_layer_norms(
    layouts: Layouts,
    statistics: Statistics,
    states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    share: float,
    ridge: float,
) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    program = layouts.symmetry.program
    nodes = {node.name: node for node in program.graph.nodes}
    for norm in find_layer_norms(program):
        value = nodes[norm.node].args[0]
        if any(layouts.value(value, dim).widened for dim in range(value.meta["val"].dim())):
            continue  # of heads, say: some it reads are fused and others are not, so one scale cannot be fitted
        if norm.name not in statistics.norms:
            raise InputError(
                f"the statistics say nothing about layer norm '{norm.name}': call pleas.collect_grouped after match"
            )
        merged |= fit_layer_norm(norm, statistics.norms[norm.name], states, share, ridge)
    return merged


def _build(
    symmetry: Symmetry,
    layouts: Layouts,
    layers: tuple[Layer, ...],
    blocks: Mapping[str, tuple[Block, ...]],
    merged: dict[str, Tensor],
    plan: Plan,
    a: nn.Module,
) -> nn.Module:
    """The parents' own class where nothing grew, else a module around the edited graph."""
    program = symmetry.program
    widened = any(p.share_apart > 0 for p in plan.classes.values())
    dtypes = {name: tensor.dtype for name, tensor in state_of(program, a).items()}
    merged = {name: value.to(dtypes[name]) for name, value in merged.items()}
    if not widened and not program.added:
        module = copy.deepcopy(a)
        state = module.state_dict()
        saved = {name: value for name, value in merged.items() if name in state}  # some buffers are not
        module.load_state_dict(
            state | saved | {alias: merged[name] for alias, name in program.tied.items() if name in merged}
        )
        return module.eval()
    split = {layer.name for layer in layers if len(blocks[layer.name]) > 1}
    graph = edit_graph(symmetry, layouts, layers, split)
    modules: dict[str, BlockLayer] = {}
    consumed: set[str] = set()
    for layer in layers:
        if layer.name in split:
            modules[layer.name] = _block_layer(layer, blocks[layer.name], layouts, merged)
            consumed |= {layer.weight, *([layer.bias] if layer.bias else [])}
    parameters = {*program.parameters, *program.added}
    tensors = {
        str(node.target): (
            _tensor(str(node.target), merged, program.constants),
            str(node.target) in parameters,
        )
        for node in graph.nodes
        if node.op == "get_attr" and node.target not in consumed
    }
    heads = next((p.heads for p in plan.classes.values() if p.heads), None)
    size = layouts.value(_output(graph, program.graph), -1).size
    return build_network(graph, modules, tensors, heads or (size,), program.notes)


@torch.no_grad()
def _check_widening(
    symmetry: Symmetry,
    layouts: Layouts,
    layers: tuple[Layer, ...],
    blocks: Mapping[str, tuple[Block, ...]],
    weights: frozenset[str],
    plan: Plan,
    a: nn.Module,
    example: Tensor,
) -> None:
    """Hold the widened graph against the parent: A merged with itself, in these very widths, has to be A."""
    program, state = symmetry.program, state_of(symmetry.program, a)
    names = (*program.parameters, *program.buffers, *program.added)
    own = {name: average(name, (state, state), symmetry, layouts, weights) for name in names}
    module = _build(symmetry, layouts, layers, blocks, own, plan, a)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((2, *example.shape[1:]), generator=generator).to(example)
    expected, found = logits_of(a(images)), module(images)
    if expected is None or not bool(expected.isfinite().all()):
        raise MergeFailed("the first parent gives no finite logits for random images: it cannot be checked")
    error = (found[..., : expected.shape[-1]] - expected).abs().max() / expected.abs().max()
    if not float(error) < WIDENING_TOLERANCE:
        raise MergeFailed(
            f"the graph widened by this plan does not compute what the parents do: merging the first parent with "
            f"itself changes its logits by {float(error):.2g} of their scale. Use budget 1.0, and please report "
            "this model"
        )


def _tensor(name: str, merged: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> Tensor:
    # A fresh copy: equal strides make equal bits after a reload, also where a kernel of size 1 leaves them open.
    value = merged[name] if name in merged else constants[name]
    return value.clone(memory_format=torch.contiguous_format)


def _output(graph: fx.Graph, source: fx.Graph) -> fx.Node:
    """The node of the parents' graph whose value is returned."""
    return next(node for node in source.nodes if node.op == "output").args[0]  # type: ignore[return-value]


def _block_layer(
    layer: Layer, blocks: tuple[Block, ...], layouts: Layouts, merged: Mapping[str, Tensor]
) -> BlockLayer:
    rows = torch.cat([block.rows for block in blocks])
    order = None if bool((rows.diff() > 0).all()) else rows.argsort().tolist()
    geometry = None
    if layer.is_convolution:
        geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": 1}
        geometry = {
            key: list(value) if isinstance(value, tuple) else value for key, value in geometry.items()
        }
    module = BlockLayer(
        kernel=layer.kernel,
        reads=[_reads(block.columns) for block in blocks],
        widths=[len(block.columns) for block in blocks],
        rows=[len(block.rows) for block in blocks],
        units=layouts.axis(layer.weight, 1).size,
        order=order,
        bias=layer.bias is not None,
        geometry=geometry,
    )
    weight = merged[layer.weight]
    with torch.no_grad():
        for name, block in zip(module.weight_names, blocks, strict=True):
            module.get_parameter(name).copy_(weight[block.rows][:, block.columns])
        if layer.bias is not None:
            module.get_parameter("bias").copy_(merged[layer.bias][rows])
    return module.to(weight.dtype)


def _reads(columns: Tensor) -> dict[str, list[int]]:
    first, last = int(columns[0]), int(columns[-1]) + 1
    return {"slice": [first, last]} if last - first == len(columns) else {"index": columns.tolist()}


def _finish(
    module: nn.Module,
    symmetry: Symmetry,
    plan: Plan,
    matching: Permutation,
    evidence: list[LayerEvidence],
    averaged: list[str],
    a: nn.Module,
    example: Tensor,
) -> MergeResult:
    """Measure what was built and hold it against the plan."""
    measured, parent = flops(module, example), flops(a, example)
    if measured != plan.flops:
        raise MergeFailed(
            f"the merged module takes {measured:,} FLOPs where the plan promised {plan.flops:,}: "
            "please report this model"
        )
    return MergeResult(
        module=module,
        plan=plan,
        matching=matching,
        symmetry=symmetry,
        layers=tuple(evidence),
        flops=measured,
        parent_flops=parent,
        parameters=sum(p.numel() for p in module.parameters()),
        averaged=tuple(averaged),
        notes=symmetry.program.notes,
    )
