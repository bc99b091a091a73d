"""Streaming second moments of the parents' units: what matching and the price of fusing are read from.

One pass over the proxies accumulates, for the inputs and the outputs of every layer, the mean and covariance of the
units of all parents side by side, `u = [a; b; ...]`, every parent in its own unit order, over images and positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from pleas.errors import InputError, NonFinite
from pleas.layers.layer import Layer, batch_dim, find_norms, is_wide
from pleas.parents import Parents
from pleas.statistics.crossing import check_rows_are_images, crossed_dims
from pleas.statistics.moments import Moments
from pleas.statistics.sampler import PositionSampler
from pleas.symmetry import execute

Progress = Callable[[str, int, int], None]
Batch = Tensor | tuple[Tensor, ...] | list[Tensor]
Site = tuple[str, int]  # a weight and its dimension: 1 its inputs, 0 its outputs


@dataclass(frozen=True)
class Statistics:
    """What one pass over the proxies leaves behind.

    units:  (weight, 1) -> moments of the layer's input units, (weight, 0) -> of its outputs, batch norm included,
            (running mean, 0) -> of the input units of a batch norm that stands alone; (1, parents * units) each. Of
            inputs that are too many (`is_wide`) nothing is kept: they are the outputs of another layer; nor of the
            outputs of heads of unequal size
    images: how many images were seen
    """

    units: Mapping[Site, Moments]
    images: int = 0

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat tensors for a cache on disk."""
        out = {"images": torch.tensor(self.images)}
        for (name, dim), moments in self.units.items():
            key = f"units/{name}/{dim}"
            out[f"{key}/count"] = torch.tensor(moments.count)
            out[f"{key}/shift"], out[f"{key}/first"] = moments.shift, moments.first
            out[f"{key}/second"] = moments.second
        return out

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Statistics:
        """Inverse of `to_tensors`."""
        units: dict[Site, Moments] = {}
        for key, count in tensors.items():
            if key.endswith("/count"):
                base = key.removesuffix("/count")
                _, name, dim = base.split("/")
                parts = (tensors[f"{base}/{part}"] for part in ("shift", "first", "second"))
                units[name, int(dim)] = Moments(int(count), *parts)
        return cls(units, int(tensors["images"]))

    def __add__(self, other: Statistics) -> Statistics:
        """Statistics of two shards of images, or of two processes, together."""
        if set(self.units) != set(other.units):
            raise InputError("statistics of different models cannot be added: their layers differ")
        units = {site: moments + other.units[site] for site, moments in self.units.items()}
        return Statistics(units, self.images + other.images)


@dataclass(frozen=True)
class _Reading:
    """What is read at a node: its first argument, or what it gives. channels: the dimension of the units; over: further
    dimensions that hold units, over which the mean is taken because it knows no order."""

    site: Site
    where: str
    channels: int
    over: tuple[int, ...]
    batch: int


def collect(
    parents: Parents,
    inputs: Iterable[Batch],
    *,
    first_image: int = 0,
    images: int | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """One pass of all parents over the proxies, in lock step.

    inputs: batches of normalised images (N, C, H, W), or of one for each parent where they normalise differently.
    first_image, images: index of the first image and number of images of all shards together, so that a shard samples
        the positions the whole would; by default these inputs are the whole, counted where they are a list.
    Raises NonFinite naming the first layer whose units are not finite.
    """
    symmetry = parents.symmetry
    check_rows_are_images(symmetry)
    before, after = _readings(parents)
    units: dict[Site, Moments] = {}
    sampler = PositionSampler(parents.settings, images or count_images(inputs))
    states: list[dict[str, Tensor]] | None = None
    index = first_image
    for done, batch in enumerate(inputs, 1):
        each = for_each(batch, parents)
        states = states or placed(parents.states, each[0])
        count, start = len(each[0]), index
        sums: list[tuple[Site, list[Tensor]]] = []

        def read(
            reading: _Reading,
            values: list[Tensor],
            *,
            count: int = count,
            start: int = start,
            sums: list[tuple[Site, list[Tensor]]] = sums,
        ) -> None:
            sums.append((reading.site, [value.sum().double() for value in values]))
            rows = [_unit_rows(x, reading, sampler, count, start) for x in values]
            joined = torch.cat(rows, -1)[None]
            if reading.site not in units:
                units[reading.site] = Moments.starting_at(joined)
            units[reading.site].add(joined)

        def visit(node: fx.Node, args: list[tuple], _: list[dict], *, read: Callable = read) -> None:
            for reading in before.get(node.name, ()):
                read(reading, [arguments[0] for arguments in args])

        def seen(node: fx.Node, values: list, *, read: Callable = read) -> None:
            for reading in after.get(node.name, ()):
                read(reading, [x[0] if isinstance(x, tuple) else x for x in values])

        with torch.no_grad():
            execute(symmetry.program.graph, states, each, visit, seen)
        _check_finite(sums, parents)
        index += count
        if progress is not None:
            progress("statistics", done, len(inputs) if hasattr(inputs, "__len__") else 0)  # type: ignore[arg-type]
    if index == first_image:
        raise InputError(
            "no proxy images: the statistics need at least one batch. Check the proxy source and its count."
        )
    return Statistics({site: moments.cpu() for site, moments in units.items()}, index - first_image)


def for_each(batch: Batch, parents: Parents) -> list[Tensor]:
    """A batch as every parent takes it."""
    if isinstance(batch, Tensor):
        return [batch] * parents.count
    if len(batch) != parents.count or not all(
        isinstance(x, Tensor) and len(x) == len(batch[0]) for x in batch
    ):
        found = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in batch]
        raise InputError(
            f"a batch holds {found}, and there are {parents.count} parents: give one tensor (N, C, H, W) for all of "
            "them, or a tuple of one each (labels do not belong there)"
        )
    return list(batch)


def count_images(inputs: Iterable[Batch]) -> int | None:
    """How many images a list of batches holds; None where only iterating could tell."""
    if not isinstance(inputs, list | tuple):
        return None
    return sum(len(batch if isinstance(batch, Tensor) else batch[0]) for batch in inputs)


def placed(states: Iterable[Mapping[str, Tensor]], like: Tensor) -> list[dict[str, Tensor]]:
    """The states where the images are."""
    return [{name: tensor.to(like.device) for name, tensor in state.items()} for state in states]


def _readings(parents: Parents) -> tuple[dict[str, list[_Reading]], dict[str, list[_Reading]]]:
    """What to read before a node is run, and after."""
    symmetry = parents.symmetry
    nodes = {node.name: node for node in symmetry.program.graph.nodes}
    before: dict[str, list[_Reading]] = {}
    after: dict[str, list[_Reading]] = {}
    for layer in parents.layers:
        for name in layer.nodes:
            channels, source = _channels(layer), nodes[name].args[0]
            end = nodes[layer.norm.node] if layer.norm is not None else nodes[name]
            if not is_wide(layer):
                over = crossed_dims(symmetry, source, channels)
                reading = _Reading((layer.weight, 1), name, channels, over, batch_dim(source))
                before.setdefault(name, []).append(reading)
            if len({state[layer.weight].shape[0] for state in parents.states}) > 1:
                continue  # heads of unequal size: outputs that are not the same things, which nobody matches
            over = crossed_dims(symmetry, nodes[name], channels)
            reading = _Reading((layer.weight, 0), end.name, channels, over, batch_dim(nodes[name]))
            after.setdefault(end.name, []).append(reading)
    for norm in find_norms(symmetry.program):
        source = nodes[norm.node].args[0]
        before.setdefault(norm.node, []).append(_Reading((norm.mean, 0), norm.node, 1, (), batch_dim(source)))
    return before, after


def _channels(layer: Layer) -> int:
    return 1 if layer.is_convolution else -1


def _unit_rows(
    value: Tensor, reading: _Reading, sampler: PositionSampler, images: int, first_image: int
) -> Tensor:
    """(rows, units) of one parent at a seeded choice of positions."""
    channels = reading.channels % value.dim()
    if reading.over:
        value = value.mean(reading.over, keepdim=True)
    value = value.movedim((reading.batch, channels), (0, -1))
    value = value.reshape(len(value), -1, value.shape[-1])
    positions = sampler(value.shape[1], value.shape[2], len(value), images, first_image)
    if positions is not None:
        chosen = positions.to(value.device)[:, :, None]
        value = value.gather(1, chosen.expand(-1, -1, value.shape[2]))
    return value.flatten(0, 1)


def _check_finite(sums: list[tuple[Site, list[Tensor]]], parents: Parents) -> None:
    """Of all sites of a batch at once: to look at a number of a GPU is to wait for it."""
    if not sums or bool(torch.stack([value for _, each in sums for value in each]).isfinite().all()):
        return
    site, name = next(
        (site, name)
        for site, each in sums
        for value, name in zip(each, parents.names, strict=True)
        if not bool(value.isfinite())
    )
    layer = site[0].rpartition(".")[0] or site[0]
    what = "input" if site[1] == 1 else "output"
    raise NonFinite(
        f"parent {name}: the {what} of layer '{layer}' is NaN or infinite on the proxy "
        "images. Check that parent's weights and the preprocessing (mean, std, range)."
    )
