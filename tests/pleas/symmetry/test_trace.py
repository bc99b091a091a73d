"""What tracing refuses and what it says about it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pleas.errors import GateFailed, InputError, UnlistedOp, UnsupportedModel
from pleas.symmetry import check_gate, supported_ops, trace
from pleas.symmetry.labels import Val, positions
from pleas.symmetry.rules import RULES, Op, Result, rule
from tests.cases import CASES, conv_bn, pooled_head, randomise


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


class Body(nn.Module):
    """What the broken forwards below have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv_bn(3, 6), pooled_head(6)

    def forward(self, x: Tensor) -> object:
        return self.head(self.stem(x))


class StochasticDepth(Body):
    """A block that is skipped at random, also in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if torch.rand(1).item() < 0.5:
            x = x + F.relu(x)
        return self.head(x)


class Bernoulli(Body):
    def __init__(self) -> None:
        super().__init__()
        self.coin = torch.distributions.Bernoulli(torch.tensor([0.5]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + x if torch.equal(self.coin.sample(), torch.ones(1)) else x)


class Numpy(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.from_numpy(self.stem(x).detach().numpy()))


class AlwaysDrops(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.stem(x), 0.5))


class Picky(Body):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 32, "made for 32 pixels"
        return self.head(self.stem(x))


class OwnError(Body):
    def forward(self, x: Tensor) -> Tensor:
        class Strange(Exception):
            pass

        raise Strange("no parent in the hierarchy")


class MakesModules(Body):
    def forward(self, x: Tensor) -> Tensor:
        self.late = nn.Linear(6, 6)
        return self.late(self.stem(x).mean((2, 3)))


class Text(Body):
    def forward(self, x: Tensor) -> str:
        return "cat"


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def halved() -> nn.Module:
    return Body().half()


def on_meta() -> nn.Module:
    return Body().to("meta")


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(6, 3), pooled_head(6))


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(conv_bn(3, 6), pooled_head(6)))


def nothing_trainable() -> nn.Module:
    return Nothing()


CONTROL = "Usually this means control flow that depends on tensor values; choose by torch.where"
UNTRACEABLE = {
    StochasticDepth: f"cannot follow the forward of StochasticDepth .* {CONTROL}",
    Bernoulli: f"cannot follow the forward of Bernoulli .* {CONTROL}",
    Numpy: r"cannot follow the forward of Numpy .* The forward leaves torch for numpy; write this step with torch",
    AlwaysDrops: r"the forward of AlwaysDrops draws random numbers even in evaluation mode \(native_dropout, in the "
    r"model's own forward\); .*: use nn.Dropout, or F.dropout\(..., training=self.training\)",
    Picky: r"AssertionError: made for 32 pixels.* Usually the images have another size",
    OwnError: r"cannot follow the forward of OwnError on one image batch of shape \(2, 3, 8, 8\): Strange: no parent",
    MakesModules: "MakesModules",
    Text: "the forward of Text returns str",
    halved: r"different precisions; convert the network by .float\(\)",
    on_meta: r"Body has tensors without values, on the meta device \(stem.0.weight\): load its weights first",
    lazy: r"Sequential has parameters without a shape \(0.weight\): run it on one batch of images first",
    scripted: "is a compiled TorchScript module: give the torch.nn.Module that it was compiled from",
    nothing_trainable: "Nothing has no parameters: there is nothing to merge",
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("build", UNTRACEABLE)
def test_every_failure_of_tracing_is_one_sentence(build: Callable[[], nn.Module], capfd: Any) -> None:
    with pytest.raises(UnsupportedModel, match=UNTRACEABLE[build]) as failure:
        trace(build().train(), torch.randn(2, 3, 8, 8))
    assert "\n" not in str(failure.value)
    assert capfd.readouterr() == ("", "")


def test_a_function_or_an_empty_example_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"function is no torch.nn.Module: give the network itself"):
        trace(F.relu, torch.randn(2, 3, 8, 8))  # type: ignore[arg-type]
    for example, what in ((torch.randn(0, 3, 8, 8), r"of shape \(0, 3, 8, 8\)"), ([1], "list")):
        with pytest.raises(InputError, match=rf"the example must be a batch of images, .*; it is {what}"):
            trace(Body(), example)  # type: ignore[arg-type]


def test_a_rule_that_fails_names_the_op_and_keeps_its_traceback() -> None:
    @rule("cumsum")
    def broken(op: Op) -> Result:
        """Fails."""
        raise KeyError("dim")

    try:
        message = (
            r"the symmetry rule of cumsum fails at cumsum in module '1' of Sequential \(KeyError: 'dim'\)"
        )
        with pytest.raises(UnsupportedModel, match=message) as failure:
            trace(with_sort(), torch.randn(2, 3, 8, 8))
    finally:
        del RULES["cumsum"]
    assert isinstance(failure.value.__cause__, KeyError)


class SinglePrecision(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x.float()).float())


class Autocast(Body):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.stem(x)
        return self.head(x.float())


@pytest.mark.parametrize("build", [SinglePrecision, Autocast])
def test_a_forward_that_fixes_its_precision_is_held_to_account_in_it(build: type[Body]) -> None:
    symmetry = trace(randomise(build(), torch.Generator().manual_seed(0)), torch.randn(2, 3, 8, 8))
    assert symmetry.gate_error < 1e-9
    assert symmetry.notes[-1].startswith(
        f"The forward of {build.__name__} fixes its precision (a cast or autocast): it was compared with its graph in "
        "float32 (relative difference "
    )


class CastsAndSums(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x.float()).cumsum(1))


@pytest.mark.usefixtures("cumsum_taken_for_pointwise")
def test_the_gate_in_single_precision_catches_a_wrong_rule() -> None:
    network = randomise(CastsAndSums(), torch.Generator().manual_seed(0))
    with pytest.raises(GateFailed, match="permuting class 0 of CastsAndSums"):
        trace(network, torch.randn(2, 3, 8, 8))
