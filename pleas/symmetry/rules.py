"""What every op does to labels: a table from ATen op names to small functions.

A rule gets an Op (arguments by name, tensors replaced by their Val) and returns the Val of its result, or a list
of them. An op without a rule pins everything it reads, which is always sound, and is reported. Ops that torch
itself tags as pointwise need no entry. How to add a rule: docs/add_an_op.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from pleas.symmetry.algebra import Algebra, anonymous
from pleas.symmetry.labels import Ledger, Shape, Val

Result = Val | list[Val]


@dataclass
class Op:
    """One call in the graph, as a rule sees it."""

    node: fx.Node
    name: str  # "convolution", without namespace and overload
    args: dict[str, Any]  # by the schema's names, defaults filled in
    shapes: list[Shape]  # of the results
    algebra: Algebra
    dynamic: frozenset[str] = frozenset()  # names of the tensor arguments that depend on the image

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    @property
    def ledger(self) -> Ledger:
        return self.algebra.ledger

    @property
    def values(self) -> list[Val]:
        """All tensor arguments, those in lists included."""
        found: list[Val] = []
        for argument in self.args.values():
            found += [
                v
                for v in (argument if isinstance(argument, list | tuple) else [argument])
                if isinstance(v, Val)
            ]
        return found


Rule = Callable[[Op], Result]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a function into the table under the names of its ops."""

    def enter(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"two rules for the op {name}")
            RULES[name] = function
        return function

    return enter


def rule_for(target: Any) -> Rule | None:
    """The rule of an op overload, None if there is none."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = op_name(target)
    if name in RULES:
        return RULES[name]
    return pointwise if torch.Tag.pointwise in target.tags else None


def is_pointwise(target: Any) -> bool:
    """Whether an op acts element by element."""
    return rule_for(target) is pointwise


def op_name(target: torch._ops.OpOverload) -> str:
    return target._schema.name.split("::")[1]


def supported_ops() -> dict[str, str]:
    """Every op with a rule of its own, and the first line of what the rule says."""
    first_line = {name: (function.__doc__ or "").strip().splitlines()[0] for name, function in RULES.items()}
    return dict(sorted(first_line.items()))


# element by element ------------------------------------------------------------------------------------------


@rule("clone", "_to_copy", "detach", "alias", "lift_fresh_copy", "contiguous", "copy", "where", "masked_fill")
@rule("leaky_relu", "_prelu_kernel", "native_dropout", "addcmul", "addcdiv", "lerp", "isin", "dropout")
def pointwise(op: Op) -> Result:
    """Element-wise with broadcasting: labels that meet in an element are related."""
    result = op.algebra.meet(op.values, op.shape)
    return result if len(op.shapes) == 1 else [result] * len(op.shapes)


@rule("full", "full_like", "zeros", "ones", "zeros_like", "ones_like", "empty", "empty_like", "scalar_tensor")
@rule("new_zeros", "new_ones", "new_full", "new_empty", "fill", "empty_permuted", "empty_strided")
def uniform(op: Op) -> Result:
    """The same number everywhere: no condition on anything."""
    return Val(op.shape)


def unlisted(op: Op) -> Result:
    """The fallback: pin every unit the op reads; its results have fixed positions only."""
    for value in op.values:
        op.algebra.pin(value, f"{op.name} at {op.node.name} has no symmetry rule")
    results = [anonymous(shape) for shape in op.shapes]
    return results[0] if len(results) == 1 else results
