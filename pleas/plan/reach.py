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

    parents: int
    ratio: float
    held: tuple[Held, ...]


def reach(parents: Parents) -> Reach:
    """What budgets these parents can reach: that of everything apart that can be kept apart."""
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
    return Reach(parents.count, model.total(apart) / max(1, model.parent), tuple(held))


def say_reach(found: Reach, budgets: Sequence[float]) -> tuple[str, ...]:
    """One sentence for the budgets that cannot be reached, or where everything apart is not the parents' ensemble."""
    beyond = [budget for budget in budgets if budget > found.ratio + SHORT]
    asked = " and ".join(f"{budget:g}" for budget in beyond)
    if beyond and not found.held:
        most = f"{found.ratio:.3f} of one parent is the most there is"
        return (f"budget {asked} cannot be reached: {most}, because no class of units can be kept apart",)
    if beyond:
        most = f"{found.ratio:.3f} of one parent is the most there is"
        what = f"budget {asked} cannot be reached: {most}, and that is not"
    elif found.held and max(budgets, default=0) >= found.parents:
        what = f"budget {found.parents}, everything apart that can be, is not"
    else:
        return ()
    reasons: dict[str, list[str]] = {}
    for one in found.held:
        reasons.setdefault(one.reason or "its units cannot be exchanged", []).append(_short(one.units))
    shown = [
        f"{units[0]}{f' and {len(units) - 1} more' if len(units) > 1 else ''} ({reason})"
        for reason, units in list(reasons.items())[:SHOWN]
    ]
    rest = f"; {len(reasons) - SHOWN} further reasons" if len(reasons) > SHOWN else ""
    return (f"{what} the parents' ensemble. Held together: {'; '.join(shown)}{rest}",)


def _short(units: str) -> str:
    parts = units.split(" - ")
    return " - ".join(parts[:3]) + (f" - {len(parts) - 3} more" if len(parts) > 3 else "")
