"""The outputs of a merged network whose parents do not share theirs."""

from __future__ import annotations

import torch

from pleas.errors import InputError
from pleas.parents import Parents
from pleas.plan.layout import ClassPlan


def merged_outputs(parents: Parents) -> ClassPlan | None:
    """One head per parent, side by side; None where the parents share all their outputs."""
    if parents.settings.heads == "shared":
        return None
    if len(parents.symmetry.output) != 1:
        raise InputError("separate heads need a model with one output layer; use heads='shared'")
    sizes = [parents.outputs(p) for p in range(parents.count)]
    masks = torch.cat([torch.full((size,), 1 << p) for p, size in enumerate(sizes)])
    sources = torch.cat([torch.arange(size) for size in sizes]).expand(parents.count, -1)
    return ClassPlan(masks, sources, sizes[0], tuple(sizes))
