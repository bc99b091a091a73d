"""Permutation symmetry, computed from the exported graph: which units may be exchanged, and where they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from pleas.errors import UnlistedOp, UnsupportedModel
from pleas.symmetry.apply import (
    Permutation,
    UnitPermutation,
    compose,
    identity,
    inverse,
    permute_state,
    position_maps,
    random,
)
from pleas.symmetry.copies import plain, unwrap
from pleas.symmetry.export import Program, execute, export_program, logits_of, state_of
from pleas.symmetry.gate import check_gate, run_gate
from pleas.symmetry.groups import Axis, DimUnits, Symmetry, UnitClass, Unlisted, coupled
from pleas.symmetry.rules import supported_ops
from pleas.symmetry.table import build
from pleas.symmetry.undisturbed import undisturbed

__all__ = [
    "RULE_HELPS",
    "Axis",
    "DimUnits",
    "Permutation",
    "Program",
    "Symmetry",
    "UnitClass",
    "UnitPermutation",
    "Unlisted",
    "check_gate",
    "compose",
    "coupled",
    "execute",
    "export_program",
    "identity",
    "inverse",
    "logits_of",
    "permute_state",
    "plain",
    "position_maps",
    "random",
    "state_of",
    "supported_ops",
    "trace",
    "undisturbed",
    "unwrap",
]

RULE_HELPS = "a symmetry rule (docs/add_an_op.md); without one its parameters are merged in place, unpermuted"


def trace(
    model: nn.Module,
    example: Tensor,
    *,
    strict: bool = False,
    rewrites: Sequence[str] = ("pad_to_conv",),
    gate: bool = True,
) -> Symmetry:
    """The permutation symmetry of `model`, derived on an image batch `example` (N, C, H, W).

    Ops without a symmetry rule pin the units they read, which is sound and listed in `Symmetry.unlisted`; with
    strict=True they raise UnlistedOp instead. With gate=True one random permutation of all classes is applied to a
    float64 copy; GateFailed if the output changes by more than 1e-9.
    """
    program = export_program(model, example, rewrites)
    model = unwrap(model)
    if not any(True for _ in model.parameters()):
        raise UnsupportedModel(f"{type(model).__name__} has no parameters: there is nothing to merge")
    symmetry = build(program, model)
    if strict and symmetry.unlisted:
        ops = "; ".join(str(op) for op in symmetry.unlisted)
        raise UnlistedOp(
            f"{type(model).__name__} uses ops without a symmetry rule: {ops}. Add a rule (docs/add_an_op.md), or trace "
            "without strict=True: the parameters above are then merged in place, unpermuted.",
            [{**item, "help": RULE_HELPS} for item in symmetry.describe()["unlisted"]],
        )
    if not gate:
        return symmetry
    error, notes = run_gate(symmetry, model, example)
    return replace(symmetry, gate_error=error, notes=(*symmetry.notes, *notes))
