"""Streaming second moments of the parents' joint layer inputs (design 3).

For every layer one pass over the proxies accumulates the mean and covariance of `u = [a; b]`: the two
parents' input rows for the same image and position. Matching, plan, least squares and predicted residuals are
linear algebra on these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from pleas.crossing import crossed_layers, crossed_nodes, needs_matching
from pleas.errors import InputError, NonFinite
from pleas.layer_norm import LayerNorm, find_layer_norms
from pleas.layers import BatchNorm, Layer, find_layers, find_norms, layer_rows, positions_of
from pleas.moments import Moments
from pleas.rows import Rows, is_wide
from pleas.settings import MergeSettings
from pleas.symmetry import Permutation, Symmetry, execute, permute_state, position_maps, state_of

Progress = Callable[[str, int, int], None]
Batch = Tensor | tuple[Tensor, Tensor]
MOMENTS = ("joint", "units", "grouped", "norms")  # fields of Statistics


@dataclass(frozen=True)
class Statistics:
    """What one pass over the proxies leaves behind.

    joint:   layer -> moments of `[a; b]`, both in their own unit order, (1, 2 d_in)   (layers without groups; those
        whose rows are units only after `collect_grouped`, which pairs the rows)
    units:   layer -> moments of the channels alone, (1, 2 channels)        (grouped layers and batch norms
        that stand alone; of layers whose rows are units the mean over them, which knows no order)
    grouped: layer -> moments of `[a_g; b_g]` group by group with b already aligned, (groups, 2 d_in)
    norms:   layer norm's scale -> moments of what its merged self gives and should give, (units, 2)
    rows:    layer -> the rows themselves, for linear layers with too many inputs for joint moments
    images:  how many images were seen
    """

    joint: Mapping[str, Moments]
    units: Mapping[str, Moments]
    grouped: Mapping[str, Moments] = field(default_factory=dict)
    norms: Mapping[str, Moments] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    images: int = 0

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat tensors for a cache on disk."""
        out = {"images": torch.tensor(self.images)}
        for kind in MOMENTS:
            for layer, moments in getattr(self, kind).items():
                key = f"{kind}/{layer}"
                out[f"{key}/count"] = torch.tensor(moments.count)
                out[f"{key}/shift"], out[f"{key}/first"] = moments.shift, moments.first
                out[f"{key}/second"] = moments.second
        for layer, rows in self.rows.items():
            out[f"rows/{layer}"] = torch.cat(rows.parts)
        return out

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Statistics:
        """Inverse of `to_tensors`."""
        found: dict[str, dict[str, Moments]] = {kind: {} for kind in MOMENTS}
        for key in tensors:
            if key.endswith("/count"):
                kind, layer = key.removesuffix("/count").split("/", 1)
                base = f"{kind}/{layer}"
                parts = (tensors[f"{base}/{part}"] for part in ("shift", "first", "second"))
                found[kind][layer] = Moments(int(tensors[key]), *parts)
        kept = {key.removeprefix("rows/"): value for key, value in tensors.items() if key.startswith("rows/")}
        rows = {layer: Rows(value.shape[1] // 2, [value], len(value)) for layer, value in kept.items()}
        return cls(**found, rows=rows, images=int(tensors["images"]))

    def __add__(self, other: Statistics) -> Statistics:
        """Statistics of two shards of images, or of two processes, together."""
        if any(set(getattr(self, kind)) != set(getattr(other, kind)) for kind in MOMENTS):
            raise InputError("statistics of different models cannot be added: their layers differ")
        return Statistics(
            {name: m + other.joint[name] for name, m in self.joint.items()},
            {name: m + other.units[name] for name, m in self.units.items()},
            {name: m + other.grouped[name] for name, m in self.grouped.items()},
            {name: m + other.norms[name] for name, m in self.norms.items()},
            {name: r + other.rows[name] for name, r in self.rows.items()},
            self.images + other.images,
        )


class PositionSampler:
    """A fixed, seeded choice of output positions per image: neighbouring positions of a map are nearly copies of one
    another, and a layer needs a few rows per unknown, not thousands (decision 0002).

    The choice depends on (seed, size of the map, index of the image) only, so shards and batch sizes do not change it.
    """

    PERIOD = 256  # images after which the choices repeat
    LEAST = 16  # positions of every image, also where a layer has few unknowns

    def __init__(self, settings: MergeSettings, images: int | None) -> None:
        self.settings, self.images = settings, images
        self._tables: dict[tuple[int, int], Tensor] = {}

    def limit(self, layer: Layer) -> int:
        """Positions per image that give `rows` rows per unknown over all images, `positions` at most."""
        if self.images is None:
            return self.settings.positions
        wanted = -(-self.settings.rows * layer.d_in // self.images)
        return min(self.settings.positions, max(self.LEAST, wanted))

    def __call__(self, layer: Layer, inputs: Tensor, batch: int, first_image: int) -> Tensor | None:
        """(N, P) positions, or None where the layer has no more than wanted. N is a multiple of the batch where
        windows of one image stand in the batch dimension."""
        parts = len(inputs) // batch
        total, limit = positions_of(layer, inputs), -(-self.limit(layer) // parts)
        if total <= limit:
            return None
        if (total, limit) not in self._tables:
            generator = torch.Generator().manual_seed(self.settings.seed)
            order = torch.rand((self.PERIOD, total), generator=generator).argsort(1)
            self._tables[total, limit] = order[:, :limit].sort(1).values
        first = first_image * parts
        entries = torch.arange(first, first + len(inputs)) % self.PERIOD
        return self._tables[total, limit][entries].to(inputs.device)


def collect(
    symmetry: Symmetry,
    a: torch.nn.Module,
    b: torch.nn.Module,
    inputs: Iterable[Batch],
    settings: MergeSettings,
    *,
    first_image: int = 0,
    images: int | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """One pass of both parents over the proxies, in lock step.

    inputs: batches of normalised images (N, C, H, W), or of pairs where the parents normalise differently.
    first_image, images: index of the first image and number of images of all shards together, so that a shard samples
        the positions the whole would; by default these inputs are the whole, counted where they have a length.
    Raises NonFinite naming the first layer whose inputs are not finite.
    """
    layers = find_layers(symmetry.program)
    crossed = crossed_nodes(symmetry)
    states = [_placed(state_of(symmetry.program, parent), parent) for parent in (a, b)]
    joint: dict[str, Moments] = {}
    units: dict[str, Moments] = {}
    rows_of: dict[str, Rows] = {}

    def gather(layer: Layer, pair: list[Tensor], positions: Tensor | None) -> None:
        if is_wide(layer):
            kept = rows_of.setdefault(layer.name, Rows(layer.d_in))
            kept.add(torch.cat([layer_rows(layer, x, positions)[0] for x in pair], -1))
        elif layer.groups == 1:
            rows = torch.cat([layer_rows(layer, x, positions) for x in pair], -1)
            _accumulate(joint, layer.name, rows)
        else:
            gather_units(layer, pair, positions)

    def gather_units(site: Layer | BatchNorm, pair: list[Tensor], positions: Tensor | None) -> None:
        _accumulate(units, site.name, torch.cat([_unit_rows(x) for x in pair], -1))

    def gather_means(dims: tuple[int, ...]) -> Gather:
        def gather(layer: Layer, pair: list[Tensor], positions: Tensor | None) -> None:
            means = [x.mean(dims, keepdim=True) if dims else x for x in pair]
            gather_units(layer, means if layer.is_convolution else [x.movedim(-1, 1) for x in means], None)

        return gather

    sites: dict[str, Site] = {node: (layer, gather) for layer in layers for node in layer.nodes}
    for layer in crossed_layers(symmetry):
        sites |= {node: (layer, gather_means(crossed.get(node, ()))) for node in layer.nodes}
    sites |= {norm.node: (norm, gather_units) for norm in find_norms(symmetry.program)}
    seen = _stream(symmetry, sites, states, inputs, settings, first_image, images, progress, "statistics")
    return Statistics(_on_cpu(joint), _on_cpu(units), rows=rows_of, images=seen)


def collect_grouped(
    symmetry: Symmetry,
    statistics: Statistics,
    matching: Permutation,
    a: torch.nn.Module,
    b: torch.nn.Module,
    inputs: Iterable[Batch],
    settings: MergeSettings,
    *,
    progress: Progress | None = None,
) -> Statistics:
    """A second pass for what can only be paired once the units are matched: the groups of grouped convolutions,
    the rows of layers whose rows are units, and layer norms. Networks without these return at once.

    Joint moments of every pair of groups would cost `groups` times more.
    """
    if not needs_second_pass(symmetry):
        return statistics
    program, layers = symmetry.program, needs_matching(symmetry)
    permuted = permute_state(symmetry, _placed(state_of(program, b), a, "cpu"), matching)
    states = [_placed(state_of(program, a), a), _placed(permuted, a)]
    maps = position_maps(symmetry, matching)
    grouped: dict[str, Moments] = {}
    joint: dict[str, Moments] = {}
    norms: dict[str, Moments] = {}

    def gather_norm(norm: LayerNorm, pair: list[Tensor], _: Tensor | None) -> None:
        _accumulate(norms, norm.name, norm.rows(pair, states))

    def gather(layer: Layer, pair: list[Tensor], positions: Tensor | None) -> None:
        channels = maps.get((layer.weight, 1))
        if layer.groups == 1 and channels is not None:  # rows paired, channels back in B's own order
            own = channels.argsort().to(pair[1].device)
            pair = [pair[0], pair[1].index_select(1 if layer.is_convolution else -1, own)]
        rows = torch.cat([layer_rows(layer, x, positions) for x in pair], -1)
        _accumulate(joint if layer.groups == 1 else grouped, layer.name, rows)

    sites: dict[str, Site] = {node: (layer, gather) for layer in layers for node in layer.nodes}
    sites |= {norm.node: (norm, gather_norm) for norm in find_layer_norms(program)}
    _stream(symmetry, sites, states, inputs, settings, 0, statistics.images, progress, "matched statistics")
    return replace(
        statistics,
        grouped=_on_cpu(grouped),
        norms=_on_cpu(norms),
        joint={**statistics.joint, **_on_cpu(joint)},
    )


def needs_second_pass(symmetry: Symmetry) -> bool:
    """Whether `collect_grouped` has anything to do."""
    return bool(needs_matching(symmetry) or find_layer_norms(symmetry.program))


Gather = Callable[[Any, list[Tensor], Tensor | None], None]
Site = tuple[
    Layer | BatchNorm | LayerNorm, Gather
]  # what is read at a node, and what to do with both parents' inputs there


def _count(inputs: Iterable[Batch]) -> int:
    """How many images a list of batches holds; 0 where only iterating could tell."""
    if not isinstance(inputs, (list, tuple)):
        return 0
    return sum(len(batch if isinstance(batch, Tensor) else batch[0]) for batch in inputs)


def _placed(
    state: Mapping[str, Tensor], parent: torch.nn.Module, device: str | None = None
) -> dict[str, Tensor]:
    """The state where the parent is: what a rewrite added, and lifted constants, are made on the CPU."""
    where = device or next(parent.parameters()).device
    return {name: tensor.to(where) for name, tensor in state.items()}


def _on_cpu(moments: Mapping[str, Moments]) -> dict[str, Moments]:
    return {name: m.cpu() for name, m in moments.items()}


def _accumulate(into: dict[str, Moments], name: str, rows: Tensor) -> None:
    if name not in into:
        into[name] = Moments.starting_at(rows)
    into[name].add(rows)


def _unit_rows(x: Tensor) -> Tensor:
    """(N, C, *spatial) -> (1, N * positions, C)"""
    return x.flatten(2).transpose(1, 2).reshape(1, -1, x.shape[1])


def _stream(
    symmetry: Symmetry,
    sites: Mapping[str, Site],
    states: list[dict[str, Tensor]],
    inputs: Iterable[Batch],
    settings: MergeSettings,
    first_image: int,
    images: int | None,
    progress: Progress | None,
    stage: str,
) -> int:
    """Run both parents in lock step over all batches and hand every layer's inputs to `gather`. Returns
    images seen."""
    total = len(inputs) if hasattr(inputs, "__len__") else 0  # type: ignore[arg-type]
    sampler: PositionSampler | None = None
    index = first_image
    with torch.no_grad():
        for done, batch in enumerate(inputs, 1):
            pair = list(batch) if isinstance(batch, (tuple, list)) else [batch, batch]
            if sampler is None:
                sampler = PositionSampler(settings, images or _count(inputs) or total * len(pair[0]) or None)

            def visit(
                node: fx.Node,
                args: list[tuple],
                _: list[dict],
                *,
                start: int = index,
                count: int = len(pair[0]),
                sample: PositionSampler = sampler,
            ) -> None:
                if node.name not in sites:
                    return
                site, gather = sites[node.name]
                values = [arguments[0] for arguments in args]
                for value, parent in zip(values, "ab", strict=True):
                    if not bool(torch.isfinite(value.sum())):
                        raise NonFinite(
                            f"parent {parent}: the input of layer '{site.name}' is NaN or infinite on the proxy "
                            "images. Check that parent's weights and the preprocessing (mean, std, range)."
                        )
                gather(
                    site, values, sample(site, values[0], count, start) if isinstance(site, Layer) else None
                )

            execute(symmetry.program.graph, states, pair, visit)
            index += len(pair[0])
            if progress is not None:
                progress(stage, done, total)
    if index == first_image:
        raise InputError(
            "no proxy images: the statistics need at least one batch. Check the proxy source and its count."
        )
    return index - first_image
