from __future__ import annotations

import re
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pleas.errors import UnsupportedModel
from pleas.symmetry.export import execute, export_program, logits_of, state_of
from tests.cases import CASES

aten = torch.ops.aten


def run(program, model: nn.Module, images: Tensor) -> Tensor:
    return execute(program.graph, [state_of(program, model)], [images])[0]


@pytest.mark.parametrize("name", CASES)
def test_the_graph_computes_what_the_module_computes(name: str) -> None:
    case = CASES[name]
    model = case.model()
    program = export_program(model, case.example())
    images = torch.randn(5, *case.shape[1:])  # another batch size than the export's
    before = images.clone()
    with torch.no_grad():
        expected = model(images.clone())
    torch.testing.assert_close(run(program, model, images), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(images, before), "in-place ops must not reach the caller's images"
    assert program.batch is None
    assert sum(node.op == "placeholder" for node in program.graph.nodes) == 1


def test_two_parents_run_in_lock_step_and_are_visited_together() -> None:
    case = CASES["residual"]
    a, b = case.model(0), case.model(1)
    program = export_program(a, case.example())
    images = case.example(3)
    seen: list[str] = []

    def visit(node: fx.Node, args: list, kwargs: list) -> None:
        assert len(args) == len(kwargs) == 2
        if node.target is aten.convolution.default:
            assert not torch.equal(args[0][1], args[1][1])
            seen.append(node.name)

    out_a, out_b = execute(
        program.graph, [state_of(program, a), state_of(program, b)], [images, images], visit
    )
    torch.testing.assert_close(out_a, a(images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out_b, b(images), rtol=1e-5, atol=1e-5)
    assert len(seen) == 11


def test_exporting_leaves_the_model_alone_and_shares_its_tensors() -> None:
    model = CASES["residual"].model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    program = export_program(model, CASES["residual"].example())
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    state = state_of(program, model)
    assert state["0.0.weight"].data_ptr() == model.get_parameter("0.0.weight").data_ptr()


def test_a_tied_tensor_has_one_node_and_its_other_names_are_listed() -> None:
    case = CASES["shared_conv"]
    program = export_program(case.model(), case.example())
    targets = [node.target for node in program.graph.nodes if node.op == "get_attr"]
    assert targets.count("shared.weight") == 1
    assert "again.weight" not in targets
    assert program.tied == {"again.weight": "shared.weight"}


def test_pad_to_conv_gives_option_a_shortcuts_a_weight() -> None:
    case = CASES["option_a"]
    model = case.model()
    program = export_program(model, case.example())
    assert list(program.added) == ["2.selection.weight", "4.selection.weight"]
    weight = program.added["2.selection.weight"]
    assert weight.shape == (8, 4, 1, 1)
    assert torch.equal(weight[2:6, :, 0, 0], torch.eye(4))
    assert weight.sum() == 4
    assert not any(node.target is aten.constant_pad_nd.default for node in program.graph.nodes)
    assert program.notes[0] == (
        "pad_to_conv: the zero-padded channels in 2 became a 1x1 convolution with weight 2.selection.weight "
        "(8, 4, 1, 1), stride (2, 2)."
    )
    images = case.example(4)
    assert torch.equal(
        run(program, model, images), run(export_program(model, case.example(), ()), model, images)
    )


class Padded(nn.Module):
    def __init__(self, pad: list[int], value: float = 0.0) -> None:
        super().__init__()
        self.conv, self.pad, self.value = nn.Conv2d(3, 4, 3), pad, value

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.conv(x), self.pad, value=self.value).mean((2, 3))


@pytest.mark.parametrize(
    ("pad", "value"), [([1, 1, 1, 1, 2, 2], 0.0), ([0, 0, 0, 0, 2, 2], 1.0), ([1, 1], 0.0)]
)
def test_pad_to_conv_leaves_other_padding_alone(pad: list[int], value: float) -> None:
    program = export_program(Padded(pad, value), torch.randn(2, 3, 8, 8))
    assert not program.added


def test_pad_to_conv_on_one_side_and_without_slices() -> None:
    model = Padded([0, 0, 0, 0, 0, 3])
    program = export_program(model, torch.randn(2, 3, 8, 8))
    assert program.added["selection.weight"].shape == (7, 4, 1, 1)
    images = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(run(program, model, images), model(images))


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 4)
        self.table = torch.arange(2048.0)
        self.register_buffer("shift", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)) + self.shift + self.table[:4] + torch.tensor([0.0, 1.0, 2.0, 3.0])


def test_constants_and_buffers_outside_the_state_dict() -> None:
    model = Constants()
    program = export_program(model, torch.randn(2, 3, 2, 2))
    assert program.buffers == ("shift",)
    assert "constants.table" in program.constants
    assert program.notes == (
        "table (2048,) is a constant of the graph, not a parameter: it is the same for every parent.",
    )
    images = torch.randn(3, 3, 2, 2)
    torch.testing.assert_close(run(program, model, images), model(images))


class Returns(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.linear, self.form = nn.Linear(12, 4), form

    def forward(self, x: Tensor) -> object:
        y = self.linear(x.flatten(1))
        return {
            "logits": {"features": x, "logits": y},
            "tuple": (y, None),
            "two": (y, x),
            "list": [y, y + 1],
        }[self.form]


@pytest.mark.parametrize("form", ["logits", "tuple"])
def test_one_tensor_is_picked_from_a_structure(form: str) -> None:
    model, images = Returns(form), torch.randn(2, 3, 2, 2)
    program = export_program(model, images)
    torch.testing.assert_close(run(program, model, images), logits_of(model(images)))
    assert "only its logits are kept" in program.notes[0]


@pytest.mark.parametrize("form", ["two", "list"])
def test_several_outputs_are_refused_in_one_sentence(form: str) -> None:
    kind = {"two": "tuple", "list": "list"}[form]
    message = f"the forward of Returns returns {kind} with 2 entries; it must return one tensor of logits"
    with pytest.raises(UnsupportedModel, match=re.escape(message)):
        export_program(Returns(form), torch.randn(2, 3, 2, 2))


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.flatten(1) * self.calls


class Baked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) * torch.arange(2.0)[:, None]


class Mixes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, -1)


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def test_what_cannot_be_exported_is_refused_in_one_sentence() -> None:
    images = torch.randn(2, 3, 2, 2)
    with pytest.raises(
        UnsupportedModel, match=r"torch.export cannot follow the forward of Branches .* control flow"
    ):
        export_program(Branches(), images)
    with pytest.raises(
        UnsupportedModel, match="the forward of Counts changes its buffer 'calls' even in evaluation"
    ):
        export_program(Counts(), images)
    with pytest.raises(
        UnsupportedModel, match=r"cannot follow the forward of TwoInputs .* other than one image tensor"
    ):
        export_program(TwoInputs(), images)
    with pytest.raises(
        UnsupportedModel,
        match=r"forward of Mixes must return one row per image, but .* \(4, .*\) for a batch of s?\d+",
    ):
        export_program(Mixes(), images)
    with pytest.raises(UnsupportedModel, match="unknown rewrite 'pad'; known rewrites: pad_to_conv"):
        export_program(Baked(), images, ("pad",))


def test_a_batch_size_written_in_the_forward_is_reported() -> None:
    program = export_program(Baked(), torch.randn(2, 3, 2, 2))
    assert program.batch == 2
    assert program.notes[0].startswith("The batch size is fixed at 2")


def test_values_are_freed_after_their_last_use() -> None:
    case = CASES["residual"]
    model = case.model()
    program = export_program(model, case.example())
    alive: list[int] = []
    made: list = []

    def visit(node: fx.Node, args: list, kwargs: list) -> None:
        made.extend(ref(a) for a in args[0] if isinstance(a, Tensor) and a.dim() == 4 and a.shape[0] == 2)
        alive.append(len({id(r()) for r in made if r() is not None}))

    execute(program.graph, [state_of(program, model)], [case.example()], visit)
    assert max(alive) <= 4


def test_another_architecture_is_named() -> None:
    program = export_program(CASES["residual"].model(), CASES["residual"].example())
    with pytest.raises(UnsupportedModel, match=r"has no tensor named '0.0.weight' \(\d+ missing in all\)"):
        state_of(program, CASES["plain"].model())
