"""The outputs of a merged network whose parents do not share theirs."""

from __future__ import annotations

from pleas.errors import InputError
from pleas.heads import plan_of_heads
from pleas.parents import Parents
from pleas.plan.layout import ClassPlan


def merged_outputs(parents: Parents) -> ClassPlan | None:
    """One head per parent, side by side, or a union of labels; None where the parents share all their outputs."""
    settings = parents.settings
    if settings.heads == "shared":
        return None
    if len(parents.symmetry.output) != 1:
        raise InputError(f"{settings.heads} heads need a model with one output layer; use heads='shared'")
    sizes = [parents.outputs(p) for p in range(parents.count)]
    return plan_of_heads(settings.heads, sizes, settings.outputs)
