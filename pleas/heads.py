"""What several parents answer together: one head for all, a head for each, or a union of what they know."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pleas.plan.layout import ClassPlan
from pleas.settings import Heads


def together(
    outputs: Sequence[Tensor], heads: Heads, places: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """(N, K) of each parent's own outputs, (N, K_p): their mean, side by side, or in a union of outputs.

    places: with a union, for each parent the merged output that each of its outputs is
    """
    if heads == "separate":
        return torch.cat(list(outputs), -1)
    if heads == "shared" or places is None:
        return torch.stack(list(outputs)).mean(0)
    width = 1 + max(place for own in places for place in own)
    total = outputs[0].new_zeros(*outputs[0].shape[:-1], width)
    count = outputs[0].new_zeros(width)
    for output, own in zip(outputs, places, strict=True):
        where = torch.tensor(own, device=output.device)
        total = total.index_add(-1, where, output)
        count = count.index_add(0, where, torch.ones_like(count[: len(own)]))
    return total / count


def plan_of_heads(
    heads: Heads, sizes: Sequence[int], places: Sequence[Sequence[int]] | None
) -> ClassPlan | None:
    """The merged outputs; None where every parent has a share in each, in one order.

    sizes: outputs of each parent
    """
    if heads == "shared":
        return None
    count = len(sizes)
    if places is None:
        ends = [sum(sizes[: p + 1]) for p in range(count)]
        places = [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    width = 1 + max(place for own in places for place in own)
    masks, sources = torch.zeros(width, dtype=torch.int64), torch.zeros(count, width, dtype=torch.int64)
    for parent, own in enumerate(places):
        where = torch.tensor(own)
        masks[where] |= 1 << parent
        sources[parent, where] = torch.arange(len(own))
    parts = tuple(sizes) if heads == "separate" else (width,)
    plan = ClassPlan(masks, sources, sizes[0], parts)
    own = bool((sources == torch.arange(width)).all())
    return None if heads == "union" and not plan.widened and own else plan
