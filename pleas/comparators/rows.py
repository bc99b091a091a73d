"""Rows of the layers' inputs, for methods that look at more of them than second moments of units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pleas.evidence import Evidence
from pleas.layers.layer import MAX_INPUTS, Layer, batch_dim, layer_rows, output_extents
from pleas.parents import Parents
from pleas.statistics.collect import for_each, placed
from pleas.statistics.moments import add_products, symmetric
from pleas.statistics.sampler import PositionSampler
from pleas.symmetry import execute

Grams = dict[str, Tensor]


def too_wide(parents: Parents) -> str | None:
    """Why the layers' Gram matrices cannot be kept, None where they can."""
    wide = next((layer for layer in parents.layers if layer.d_in > MAX_INPUTS), None)
    if wide is None:
        return None
    gigabytes = 8 * wide.d_in**2 * parents.count / 1e9
    return (
        f"layer '{wide.name}' reads {wide.d_in:,} inputs, whose Gram matrices would take {gigabytes:.1f} GB"
    )


def sampler_of(evidence: Evidence) -> PositionSampler:
    """The positions of every image that the statistics were read at."""
    return PositionSampler(evidence.parents.settings, evidence.statistics.images)


def rows_at(
    layer: Layer, node: fx.Node, value: Tensor, sampler: PositionSampler, images: int, first: int
) -> tuple[Tensor, int]:
    """Rows (groups, rows, d_in) of a layer's input at the sampled positions, and how many belong to one image.

    images, first: how many images the batch holds, and the index of its first
    """
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    value = value.movedim(batch_dim(source), 0)
    places = output_extents(layer, value.shape[2:]) if layer.is_convolution else value.shape[1:-1]
    positions = sampler(int(torch.Size(places).numel()), layer.d_in, len(value), images, first)
    rows = layer_rows(layer, value, None if positions is None else positions.to(value.device))
    return rows, rows.shape[1] // images


def add_gram(grams: Grams, layer: Layer, rows: Tensor) -> None:
    """Add X^T X of rows (groups, rows, d_in)."""
    if layer.name not in grams:
        grams[layer.name] = rows.new_zeros((len(rows), layer.d_in, layer.d_in), dtype=torch.float64)
    add_products(grams[layer.name], rows)


def collect_grams(evidence: Evidence) -> list[Grams]:
    """Per parent, in the common order: layer -> X^T X of its inputs, (groups, d_in, d_in) float64 on the CPU.

    One pass of all parents over the proxies.
    """
    parents = evidence.parents
    owner = {name: layer for layer in parents.layers for name in layer.nodes}
    sampler, found = sampler_of(evidence), [Grams() for _ in range(parents.count)]
    states: Sequence[Mapping[str, Tensor]] | None = None
    first = 0
    for batch in evidence.inputs:
        each = for_each(batch, parents)
        states = states or placed(evidence.states, each[0])
        images, start = len(each[0]), first

        def visit(node: fx.Node, args: list[tuple[Any, ...]], _: Any, images=images, start=start) -> None:
            layer = owner.get(node.name)
            if layer is not None:
                for grams, arguments in zip(found, args, strict=True):
                    rows, _per_image = rows_at(layer, node, arguments[0], sampler, images, start)
                    add_gram(grams, layer, rows)

        with torch.no_grad():
            execute(parents.symmetry.program.graph, states, each, visit)
        first += images
    return [whole(grams) for grams in found]


def whole(grams: Grams) -> Grams:
    """Gram matrices of which the upper triangle was summed, in full and on the CPU."""
    return {name: symmetric(gram.cpu()) for name, gram in grams.items()}


def surest_parent(evidence: Evidence) -> Tensor:
    """(images,) the parent to whom every proxy is counted where a method wants images for each parent.

    The one under which the image stands earliest when all images are sorted by the entropy of the parent's predictions:
    ranks, so that a parent that is sure of everything does not get them all. The first of equals.
    """
    parents = evidence.parents
    entropies: list[list[Tensor]] = [[] for _ in range(parents.count)]
    states: Sequence[Mapping[str, Tensor]] | None = None
    for batch in evidence.inputs:
        each = for_each(batch, parents)
        states = states or placed(parents.states, each[0])
        with torch.no_grad():
            answers = execute(parents.symmetry.program.graph, states, each)
        for kept, answer in zip(entropies, answers, strict=True):
            logs = answer.double().log_softmax(-1)
            entropy = -(logs.exp() * logs).sum(-1)
            kept.append(entropy.flatten(1).mean(1).cpu() if entropy.dim() > 1 else entropy.cpu())
    ranks = torch.stack([torch.cat(kept).argsort(stable=True).argsort(stable=True) for kept in entropies])
    return ranks.argmin(0)
