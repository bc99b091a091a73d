"""What tracing refuses and what it says about it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pleas.errors import GateFailed, UnlistedOp
from pleas.symmetry import check_gate, supported_ops, trace
from pleas.symmetry.labels import Val, positions
from pleas.symmetry.rules import RULES, Op, Result, rule
from tests.cases import CASES, randomise


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


def with_sort() -> nn.Module:
    parts = [
        nn.Conv2d(3, 6, 3),
        Sorted(),
        nn.Conv2d(6, 5, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
    ]
    return randomise(nn.Sequential(*parts).eval(), torch.Generator().manual_seed(0))


def test_an_unlisted_op_pins_what_it_reads_and_is_reported() -> None:
    symmetry = trace(with_sort(), torch.randn(2, 3, 8, 8))
    assert [(u.op, u.module, u.parameters) for u in symmetry.unlisted] == [
        ("cumsum", "1", ("0.weight", "0.bias"))
    ]
    assert [c.size for c in symmetry.classes if c.kind != "output"] == [5]
    assert symmetry.fixed["0.weight", 0] == "cumsum at cumsum has no symmetry rule"


def test_strict_names_op_node_module_and_parameters() -> None:
    message = (
        "Sequential uses ops without a symmetry rule: cumsum (cumsum, in module '1') pins 0.weight, 0.bias. "
        "Add a rule (docs/add_an_op.md)"
    )
    with pytest.raises(UnlistedOp, match=re.escape(message)):
        trace(with_sort(), torch.randn(2, 3, 8, 8), strict=True)


@pytest.fixture
def cumsum_taken_for_pointwise() -> Iterator[None]:
    """A wrong rule, as an example of what the gate is for (and of how a rule is added)."""

    @rule("cumsum")
    def wrong(op: Op) -> Result:
        """Wrongly taken for element-wise."""
        return op.algebra.meet(op.values, op.shape)

    yield
    del RULES["cumsum"]


@pytest.mark.usefixtures("cumsum_taken_for_pointwise")
def test_the_gate_catches_a_wrong_rule_and_names_the_class() -> None:
    assert supported_ops()["cumsum"] == "Wrongly taken for element-wise."
    message = (
        r"permuting class 0 of Sequential \(6 units: 0.weight\[out\] - 0.\* - 2.weight\[in\]\) changes the output: "
        r"relative difference .* in float64 with all classes permuted, where 1e-09 is allowed"
    )
    with pytest.raises(GateFailed, match=message):
        trace(with_sort(), torch.randn(2, 3, 8, 8))


def running(op: Op) -> Result:
    """Adds up along `dim`, whose order is fixed; every other dimension is left as it is."""
    value = op["self"]
    places = Val(value.shape, [], positions(value.shape, [op["dim"] % len(value.shape)]))
    return op.algebra.meet([value, places], op.shape)


def test_the_worked_example_of_the_documentation(project: Path) -> None:
    assert inspect.getsource(running) in (project / "docs" / "add_an_op.md").read_text()
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(2), Sorted(), nn.Conv1d(6, 5, 1), nn.Flatten())
    randomise(network.eval(), torch.Generator().manual_seed(0))
    rule("cumsum")(running)
    try:
        fixed = trace(with_sort(), torch.randn(2, 3, 8, 8), strict=True)
        network[2] = Along()
        free = trace(network, torch.randn(2, 3, 8, 8), strict=True)
    finally:
        del RULES["cumsum"]
    assert [c.size for c in fixed.classes if c.kind != "output"] == [5]
    assert [c.size for c in free.classes if c.kind != "output"] == [6]


class Along(nn.Module):
    """A running sum over positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(2)


class Remembers(nn.Module):
    """Adds something kept outside its parameters, different for every call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(12, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x.flatten(1)) + self.calls


def test_a_forward_that_is_no_function_is_blamed_on_the_export() -> None:
    model = Remembers()
    symmetry = trace(model, torch.randn(2, 3, 2, 2), gate=False)
    model(torch.randn(2, 3, 2, 2))
    with pytest.raises(GateFailed, match="the exported graph of Remembers does not compute what the module"):
        check_gate(symmetry, model, torch.randn(2, 3, 2, 2))


class Casts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.softmax(self.a(x.flatten(1)), -1, dtype=torch.float32).to(x.dtype))


def test_a_cast_inside_the_module_is_no_reason_to_fail() -> None:
    symmetry = trace(Casts(), torch.randn(2, 3, 2, 2))
    assert symmetry.gate_error < 1e-9
    first = symmetry.classes[0]
    assert (first.size, first.reason) == (6, "a softmax runs over it")


def test_unused_parameters_are_noted() -> None:
    model = CASES["residual"].model()
    model[1].extra = nn.Linear(3, 3)  # type: ignore[index]
    symmetry = trace(model, CASES["residual"].example(), gate=False)
    assert symmetry.notes == (
        "2 parameters are not used by the forward in evaluation mode: 1.extra.weight, 1.extra.bias.",
    )


def test_two_rules_for_one_op_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="two rules for the op convolution"):
        rule("convolution")(lambda op: Val(op.shape))


def test_the_list_of_supported_ops_is_generated() -> None:
    ops = supported_ops()
    assert {
        "convolution",
        "linear",
        "cat",
        "view",
        "scaled_dot_product_attention",
        "native_layer_norm",
    } <= set(ops)
    assert all(text for text in ops.values())
