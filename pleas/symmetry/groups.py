"""The table the tracer produces: classes of exchangeable units, and where their units stand.

A unit is a channel, a neuron, a head, a group of channels. Units of one class may be permuted freely; a unit with
inner freedom has classes of its own (the channels of a group, the dimensions of a head), which move along with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pleas.symmetry.labels import Val, squash, varying
from pleas.symmetry.program import Program


@dataclass(frozen=True)
class Axis:
    """Where the units of a class stand on one tensor axis.

    index: int64 (units, positions), the ascending positions each unit owns, its children's included. On dim 1 of a
    grouped convolution's weight these are positions of the virtual axis of all channels (see Symmetry.groups).
    """

    tensor: str
    dim: int
    index: Tensor


@dataclass(frozen=True)
class UnitClass:
    """Units that may be exchanged; `children` holds the inner classes of each unit, () where there are none."""

    name: str
    size: int
    kind: str
    axes: tuple[Axis, ...]
    children: tuple[tuple[UnitClass, ...], ...]
    widenable: bool = True
    reason: str = ""

    def walk(self) -> Iterator[UnitClass]:
        """This class and all classes inside its units."""
        yield self
        for inner in self.children:
            for child in inner:
                yield from child.walk()


@dataclass(frozen=True)
class DimUnits:
    """Which top-level unit each position of one tensor dimension belongs to; both int64 (size,), -1 = fixed."""

    cls: Tensor
    unit: Tensor


def units_along(value: Val, dim: int, place: DimUnits) -> DimUnits | None:
    """Units along one dimension of a value; None where that dimension carries no units of its own."""
    if not value.shape:
        return None
    dim %= len(value.shape)
    for label in value.free:
        known = label >= 0
        ids = label.clamp(min=0)
        cls = squash(torch.where(known, place.cls[ids], -1))
        unit = squash(torch.where(known, place.unit[ids], -1))
        if varying(cls) | varying(unit) == {dim} and bool((cls >= 0).any()):
            size = (value.shape[dim],)
            return DimUnits(cls.reshape(-1).expand(size).clone(), unit.reshape(-1).expand(size).clone())
    return None


@dataclass(frozen=True)
class Unlisted:
    """An op without a rule, where it stands, and the parameters it pinned."""

    op: str
    node: str
    module: str
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        where = f"in module {self.module!r}" if self.module else "in the model's own forward"
        pinned = ", ".join(self.parameters[:6]) + (", ..." if len(self.parameters) > 6 else "")
        return f"{self.op} ({self.node}, {where}) pins {pinned or 'no parameter'}"


@dataclass(frozen=True)
class Symmetry:
    """The permutation symmetry of one architecture.

    fixed:    (FQN, dim) -> why positions of that axis cannot be permuted
    output:   indices of the classes that reach the output; they are permuted only on request
    groups:   FQN of a grouped convolution's weight -> its number of groups
    gate_error: relative change of the output under a random permutation, float64; nan when not checked
    """

    program: Program
    classes: tuple[UnitClass, ...]
    fixed: Mapping[tuple[str, int], str]
    unlisted: tuple[Unlisted, ...]
    output: tuple[int, ...]
    groups: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    gate_error: float = float("nan")
    notes: tuple[str, ...] = ()
    _axes: Mapping[tuple[str, int], DimUnits] = field(default_factory=dict, repr=False)
    _labels: Mapping[str, Val] = field(default_factory=dict, repr=False)
    _place: DimUnits | None = field(default=None, repr=False)  # top-level class and unit of every id

    def axis(self, fqn: str, dim: int) -> DimUnits:
        """Units along one axis of a parameter or buffer (virtual axis for dim 1 of a grouped weight)."""
        fqn = self.program.tied.get(fqn, fqn)
        found = self._axes.get((fqn, dim))
        if found is not None:
            return found
        if fqn not in self.shapes:
            raise KeyError(f"the program reads no tensor named {fqn!r}")
        size = self.shapes[fqn][dim] * (self.groups.get(fqn, 1) if dim == 1 else 1)
        return DimUnits(torch.full((size,), -1), torch.full((size,), -1))

    def value(self, node: str, dim: int) -> DimUnits | None:
        """Units along one dimension of an activation; None where that dimension carries no units of its own."""
        value, place = self._labels.get(node), self._place
        return None if value is None or place is None else units_along(value, dim, place)

    def spread(self, node: str, but: Sequence[int] = ()) -> set[int]:
        """Dimensions of an activation along which units vary, of all top-level classes but these."""
        value, place = self._labels.get(node), self._place
        found: set[int] = set()
        if value is None or place is None:
            return found
        excluded = torch.tensor([-1, *but])
        for label in value.free:
            ids = label.clamp(min=0)
            here = (label >= 0) & ~torch.isin(place.cls[ids], excluded)
            for ofs in (place.cls, place.unit):
                found |= varying(squash(torch.where(here, ofs[ids], -1)))
        return found

    def permutable_share(self, state: Mapping[str, Tensor] | None = None) -> float:
        """Share of parameter and running-statistic elements that stand on at least one permutable position.

        `state` may restrict the count to some tensors (by default: all parameters of the program).
        """
        names = self.program.parameters if state is None else [n for n in self.shapes if n in state]
        total = moved = 0
        for name in names:
            shape = self.shapes[name]
            still = torch.ones(shape, dtype=torch.bool)
            for dim in range(len(shape)):
                units = self.axis(name, dim).cls
                if dim == 1 and name in self.groups:
                    units = units.reshape(self.groups[name], -1)
                    units = units.repeat_interleave(shape[0] // self.groups[name], 0)
                    still &= (units < 0).reshape(*units.shape, *(1,) * (len(shape) - 2))
                else:
                    still &= (units < 0).reshape([-1 if d == dim else 1 for d in range(len(shape))])
            total += still.numel()
            moved += still.numel() - int(still.sum())
        return moved / total if total else 0.0

    def describe(self) -> dict:
        """The whole table as plain data, for printing and JSON."""
        return {
            "classes": [_described(c, self.shapes) for c in self.classes],
            "fixed": [{"tensor": t, "dim": d, "reason": why} for (t, d), why in self.fixed.items()],
            "unlisted": [
                {"op": u.op, "node": u.node, "module": u.module, "parameters": list(u.parameters)}
                for u in self.unlisted
            ],
            "permutable_share": self.permutable_share(),
            "gate_error": self.gate_error,
            "notes": [*self.program.notes, *self.notes],
        }


def coupled(cls: UnitClass, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The coupled parameters in one line: `conv1.weight[out] - bn1.* - conv2.weight[in]`."""
    parts: list[str] = []
    for axis in cls.axes:
        ndim = len(shapes[axis.tensor])
        stem, _, leaf = axis.tensor.rpartition(".")
        side = {0: "out", 1: "in"}.get(axis.dim, str(axis.dim)) if ndim > 1 else ""
        part = f"{axis.tensor}[{side}]" if side else f"{stem}.*" if stem else leaf
        if part not in parts:
            parts.append(part)
    return " - ".join(parts)


def _described(cls: UnitClass, shapes: Mapping[str, tuple[int, ...]]) -> dict:
    inner = cls.children[0] if cls.children else ()
    return {
        "name": cls.name,
        "size": cls.size,
        "kind": cls.kind,
        "coupled": coupled(cls, shapes),
        "axes": [
            {"tensor": a.tensor, "dim": a.dim, "positions_per_unit": a.index.shape[1]} for a in cls.axes
        ],
        "widenable": cls.widenable,
        "reason": cls.reason,
        "children": [_described(c, shapes) for c in inner],
    }
