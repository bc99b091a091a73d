"""How far a budget can go: what can be kept apart of a network, and what holds the rest.

A class of units that no arithmetic lets grow stays fused at any budget, so that some networks stop short of all their
parents side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pleas.parents import Parents
from pleas.plan.cost import FlopModel, Masks
from pleas.plan.heads import merged_outputs
from pleas.symmetry import coupled

SHORT = 0.005  # of a parent's multiply-adds: a budget counts as reached from there on
SHOWN = 3


@dataclass(frozen=True)
class Held:
    """A class that cannot be kept apart. share: of the network's multiply-adds, those of the layers it stands on."""

    units: str
    count: int
    reason: str
    share: float


@dataclass(frozen=True)
class Reach:
    """The largest ratio of multiply-adds to one parent's that a plan can have, and what holds it; dearest first."""

    ratio: float
    least: float
    held: tuple[Held, ...]


def reach(parents: Parents) -> Reach:
    """What budgets these parents can reach: everything that can be widened kept apart, and nothing."""
    symmetry = parents.symmetry
    model = FlopModel(symmetry, parents.count, merged_outputs(parents))
    apart: Masks = {
        i: {1 << p: c.size for p in range(parents.count)}
        for i, c in enumerate(symmetry.classes)
        if c.widenable and i not in symmetry.output
    }
    held = [
        Held(coupled(c, symmetry.shapes), c.size, c.reason, model.total({}, [i]) / max(1, model.parent))
        for i, c in enumerate(symmetry.classes)
        if not c.widenable and i not in symmetry.output
    ]
    held.sort(key=lambda one: -one.share)
    parent = max(1, model.parent)
    return Reach(model.total(apart) / parent, model.total({}) / parent, tuple(held))


def say_reach(found: Reach, budgets: Sequence[float]) -> tuple[str, ...]:
    """One sentence for the budgets that cannot be reached, none where all can."""
    beyond = [budget for budget in budgets if budget > found.ratio + SHORT]
    if not beyond:
        return ()
    asked = " and ".join(f"{budget:g}" for budget in beyond)
    what = f"budget {asked} cannot be reached: {found.ratio:.3f} of one parent is the most there is"
    if not found.held:
        return (f"{what}, because no class of units can be kept apart",)
    reasons = dict.fromkeys(one.reason or "its units cannot be exchanged" for one in found.held)
    shown = []
    for reason in list(reasons)[:SHOWN]:
        alike = [one for one in found.held if (one.reason or "its units cannot be exchanged") == reason]
        more = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
        shown.append(f"{_short(alike[0].units)}{more} ({reason})")
    rest = f"; {len(reasons) - SHOWN} further reasons" if len(reasons) > SHOWN else ""
    return (f"{what}, and that is not the parents' ensemble. Held together: {'; '.join(shown)}{rest}",)


def _short(units: str) -> str:
    parts = units.split(" - ")
    return " - ".join(parts[:3]) + (f" - {len(parts) - 3} more" if len(parts) > 3 else "")
