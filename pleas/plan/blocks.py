"""What the owners of its inputs and outputs make of a layer: dense blocks, and the partial merge of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pleas.layers.layer import Layer
from pleas.plan.layout import Layout


@dataclass(frozen=True)
class Block:
    """Output positions that share one set of input positions; the rest of their weights are structurally
    zero."""

    rows: Tensor
    columns: Tensor


def blocks_of(layer: Layer, inputs: Layout, outputs: Layout) -> tuple[Block, ...]:
    """Which merged outputs read which merged inputs: those that share an owner. One block where nothing is
    structurally zero."""
    if layer.groups > 1 or not inputs.widened:
        return (Block(torch.arange(outputs.size), torch.arange(inputs.size)),)
    blocks = [Block(outputs.positions(mask), inputs.readable(mask)) for mask in outputs.present()]
    return tuple(block for block in blocks if len(block.columns))


def partial_merge(weights: Sequence[Tensor], inputs: Layout, outputs: Layout) -> Tensor:
    """The weights before least squares: (out, taps, in) from aligned parents' (o, taps, i).

    A row averages over its owners; of an owner's weights it takes those on inputs which that owner has a share in.
    """
    merged = weights[0].new_zeros((outputs.size, weights[0].shape[1], inputs.size))
    for parent, weight in enumerate(weights):
        # Where a parent is no owner its source may lie outside its axis: the coefficient is zero, any row will do.
        rows = outputs.sources[parent].clamp_max(weight.shape[0] - 1)
        columns = inputs.sources[parent].clamp_max(weight.shape[2] - 1)
        reads = (inputs.masks >> parent & 1).to(weight)
        merged += outputs.mixing(parent).to(weight)[:, None, None] * weight[rows][:, :, columns] * reads
    return merged
