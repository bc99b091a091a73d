"""From the solved forest to the table of classes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from pleas.errors import UnsupportedModel
from pleas.symmetry.blocks import ROOT
from pleas.symmetry.forest import Forest, solve
from pleas.symmetry.groups import Axis, DimUnits, Symmetry, UnitClass, Unlisted
from pleas.symmetry.labels import BILINEAR, Ledger
from pleas.symmetry.program import Program, named_tensors, state_of
from pleas.symmetry.tracking import Tracked, track
from pleas.symmetry.widening import obstacles

Stand = dict[
    int, dict[int, np.ndarray]
]  # unit -> touch -> ascending positions, those of inner units included

INNER = "inner units have to be as many in every unit"
ALONE = "no other position plays the same role"
TAPS = "a position in the kernel of a convolution has its place"
CHANNELS = "a channel of the image has its place"


def build(program: Program, model: nn.Module) -> Symmetry:
    """Track, solve and tabulate the symmetry of a program; `model` supplies shapes and constants."""
    tracked = track(program, model)
    forest = solve(tracked.ledger)
    builder = _Builder(tracked, forest)
    place = _place(tracked.ledger, forest, builder.units)
    classes = builder.top(obstacles(program.graph, tracked.values, place))
    shapes = {name: tuple(tensor.shape) for name, tensor in state_of(program, model).items()}
    axes = _axes(tracked.ledger, place)
    _check_coverage(program, shapes, axes)
    return Symmetry(
        program=program,
        classes=classes,
        fixed=_fixed(tracked.ledger, forest, axes) | _of_convolutions(program, axes),
        unlisted=_unlisted(tracked, forest),
        output=tuple(k for k, c in enumerate(classes) if c.kind == "output"),
        groups=dict(tracked.groups),
        shapes=shapes,
        notes=_unused(program, model),
        _axes=axes,
        _labels=tracked.values,
        _place=place,
    )


class _Builder:
    """Makes UnitClass objects; `units[k]` lists the units of top-level class k."""

    def __init__(self, tracked: Tracked, forest: Forest) -> None:
        self.ledger, self.forest = tracked.ledger, forest
        self.stand = _stands(tracked.ledger, forest)
        self.marked = _marked(tracked.ledger, forest)
        self.heads = _around(forest, [unit for unit, reason in self.marked.items() if reason == BILINEAR])
        self.output = set(forest.unit_of[tracked.output].tolist())
        self.units = self._freedoms(ROOT)

    def top(self, ragged: Mapping[int, str]) -> tuple[UnitClass, ...]:
        return tuple(self._make(units, str(k), ragged.get(k, "")) for k, units in enumerate(self.units))

    def _freedoms(self, unit: int) -> list[list[int]]:
        """Classes of exchangeable units inside a unit; a unit without partner passes on its own inner classes."""
        found: list[list[int]] = []
        for units in self.forest.classes.get(unit, []):
            found += [units] if len(units) > 1 else self._freedoms(units[0])
        return found

    def _make(self, units: list[int], name: str, ragged: str) -> UnitClass:
        stands = [self.stand[u] for u in units]
        axes = []
        for touch in stands[0]:
            born = self.ledger.touches[touch]
            index = torch.from_numpy(np.stack([stand[touch] for stand in stands]))
            axes.append(Axis(born.tensor, born.dim, index))
        inner = [self._freedoms(u) for u in units]
        children = tuple(tuple(self._make(c, f"{name}.{j}", INNER) for j, c in enumerate(f)) for f in inner)
        kind = self._kind(units, bool(children[0]))
        reason = "it is the output" if kind == "output" else self._mark(units) or ragged
        return UnitClass(
            name, len(units), kind, tuple(axes), children if children[0] else (), not reason, reason
        )

    def _kind(self, units: list[int], nested: bool) -> str:
        if any(u in self.output for u in units):
            return "output"
        if any(u in self.heads for u in units):
            return "head"
        return "group" if nested else "channel"

    def _mark(self, units: list[int]) -> str:
        return next((self.marked[u] for u in units if u in self.marked), "")


def _stands(ledger: Ledger, forest: Forest) -> Stand:
    """Where every unit stands, on every touched axis."""
    touches = ledger.touches
    ids = np.concatenate([np.arange(t.first, t.first + t.size) for t in touches] or [np.zeros(0, np.int64)])
    touch = np.repeat(np.arange(len(touches)), [t.size for t in touches])
    position = np.concatenate([np.arange(t.size) for t in touches] or [np.zeros(0, np.int64)])
    owner, rows = forest.unit_of[ids], []
    while len(owner):
        rows.append(np.stack([owner, touch, position]))
        up = forest.parent[owner]
        owner, touch, position = up[up >= 0], touch[up >= 0], position[up >= 0]
    table = np.concatenate(rows, 1) if rows else np.zeros((3, 0), np.int64)
    table = table[:, np.lexsort((table[2], table[1], table[0]))]
    cuts = np.flatnonzero((np.diff(table[0]) != 0) | (np.diff(table[1]) != 0)) + 1
    stands: Stand = {}
    for part in np.split(table, cuts, axis=1):
        if part.shape[1]:
            stands.setdefault(int(part[0, 0]), {})[int(part[1, 0])] = part[2]
    return stands


def _marked(ledger: Ledger, forest: Forest) -> dict[int, str]:
    found: dict[int, str] = {}
    for ids, reason in ledger.marks:
        for unit in np.unique(forest.unit_of[ids]).tolist():
            found.setdefault(unit, reason)
    return found


def _around(forest: Forest, units: list[int]) -> set[int]:
    """All blocks around some units."""
    found: set[int] = set()
    while units:
        units = [
            parent for unit in units if (parent := int(forest.parent[unit])) != ROOT and parent not in found
        ]
        found.update(units)
    return found


def _place(ledger: Ledger, forest: Forest, top: list[list[int]]) -> DimUnits:
    """Top-level class and unit of every id (the id's own unit, or the one around it)."""
    count = len(forest.parent)
    cls, unit = np.full(count, -1), np.full(count, -1)
    for k, units in enumerate(top):
        cls[units], unit[units] = k, np.arange(len(units))
    for _ in range(64):  # hand down to inner units
        kids = np.flatnonzero((cls < 0) & (forest.parent >= 0))
        kids = kids[cls[forest.parent[kids]] >= 0]
        if not len(kids):
            break
        cls[kids], unit[kids] = cls[forest.parent[kids]], unit[forest.parent[kids]]
    return DimUnits(torch.from_numpy(cls[forest.unit_of]), torch.from_numpy(unit[forest.unit_of]))


def _axes(ledger: Ledger, place: DimUnits) -> dict[tuple[str, int], DimUnits]:
    return {
        (t.tensor, t.dim): DimUnits(
            place.cls[t.first : t.first + t.size], place.unit[t.first : t.first + t.size]
        )
        for t in ledger.touches
    }


def _fixed(
    ledger: Ledger, forest: Forest, axes: Mapping[tuple[str, int], DimUnits]
) -> dict[tuple[str, int], str]:
    """Why positions of an axis are in no class."""
    reason_of_unit: dict[int, str] = {}
    reasons = {}
    for touch in ledger.touches:
        free = axes[touch.tensor, touch.dim].cls.numpy() >= 0
        if free.all():
            continue
        first = touch.first + int(np.flatnonzero(~free)[0])
        unit = int(forest.unit_of[first])
        if unit not in reason_of_unit:
            reason_of_unit[unit] = ledger.reason_of(forest.members[unit]) or ALONE
        part = "" if not free.any() else f"{int((~free).sum())} of {touch.size} positions: "
        reasons[touch.tensor, touch.dim] = part + reason_of_unit[unit]
    return reasons


def _of_convolutions(
    program: Program, axes: Mapping[tuple[str, int], DimUnits]
) -> dict[tuple[str, int], str]:
    """Better words for what every convolution fixes: its taps, and the channels of the image."""
    found: dict[tuple[str, int], str] = {}
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten.convolution.default or node.args[1].op != "get_attr":
            continue
        weight, image = str(node.args[1].target), node.args[0].op == "placeholder"
        for dim in range(1 if image else 2, node.args[1].meta["val"].dim()):
            if (weight, dim) in axes and not bool((axes[weight, dim].cls >= 0).any()):
                found[weight, dim] = CHANNELS if dim == 1 else TAPS
    return found


def _unlisted(tracked: Tracked, forest: Forest) -> tuple[Unlisted, ...]:
    found = []
    for op in tracked.unruled:
        units = np.unique(forest.unit_of[op.ids]) if len(op.ids) else op.ids
        names = [
            t.tensor
            for t in tracked.ledger.touches
            if np.isin(forest.unit_of[t.first : t.first + t.size], units).any()
        ]
        found.append(Unlisted(op.op, op.node, op.module, tuple(dict.fromkeys(names))))
    return tuple(found)


def _check_coverage(
    program: Program, shapes: Mapping[str, tuple[int, ...]], axes: Mapping[tuple[str, int], DimUnits]
) -> None:
    """Every axis of every parameter must have been looked at."""
    for name in (*program.parameters, *program.added):
        for dim, size in enumerate(shapes[name]):
            if size > 1 and (name, dim) not in axes:
                raise UnsupportedModel(
                    f"axis {dim} of {name} {shapes[name]} was not traced; this is a bug in pleas"
                )


def _unused(program: Program, model: nn.Module) -> tuple[str, ...]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    known = {*program.parameters, *program.tied}
    names = [name for name in named_tensors(model) if name in parameters and name not in known]
    if not names:
        return ()
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return (f"{len(names)} parameters are not used by the forward in evaluation mode: {shown}.",)
