"""Nothing that is given to tracing is changed by it: modes, buffers, attributes, random state, gradients."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pleas.errors import PleasError
from pleas.guards import check_forwards
from pleas.symmetry import export_program, trace, undisturbed
from tests.cases import conv_bn, pooled_head


class Leaves(nn.Module):
    """Marks of every kind: batch norms, dropout, a counter, a cache, a feature, its own random numbers."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.stem, self.drop, self.head = conv_bn(3, 6), nn.Dropout(0.5), pooled_head(6)
        self.frozen = nn.BatchNorm2d(6).eval()
        self.calls, self.fails, self.cache = 0, fails, {}
        self.feature: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.feature = self.frozen(self.stem(x))
        random.random()
        np.random.rand()  # noqa: NPY002
        if self.fails:
            raise ValueError("on purpose")
        return self.head(self.drop(self.feature))


def marks(module: nn.Module) -> dict[str, Any]:
    """Everything of a module that a call could change, copied."""
    found: dict[str, Any] = {f"tensor {n}": t.clone() for n, t in module.state_dict().items()}
    for name, part in module.named_modules():
        found[f"mode {name}"] = part.training
        found[f"names {name}"] = [*part.__dict__, *part._buffers, *part._parameters]
        plain = {k: v for k, v in vars(part).items() if isinstance(v, int | None)}
        found |= {f"attribute {name}.{key}": value for key, value in plain.items()}
    found["torch"], found["python"] = torch.get_rng_state(), random.getstate()
    found["numpy"] = np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    found["gradients"] = torch.is_grad_enabled()
    found["wanted"] = [p.requires_grad for p in module.parameters()]
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        other = after[key]
        same = np.array_equal(value, other) if isinstance(value, Tensor | np.ndarray) else value == other
        assert same, key


def mixed() -> Leaves:
    """In train mode but for one frozen batch norm, with a feature of an earlier call."""
    torch.manual_seed(0)
    model = Leaves().train()
    model.frozen.eval()
    model(torch.randn(4, 3, 8, 8))
    return model


@pytest.mark.parametrize("stage", ["trace", "export", "guards"])
def test_a_network_in_training_is_left_as_it_was(stage: str) -> None:
    model, images = mixed(), torch.randn(2, 3, 8, 8)
    given, before, feature = images.clone(), marks(model), model.feature
    if stage == "trace":
        trace(model, images)
    else:
        program = export_program(model, images)
        if stage == "guards":
            check_forwards(program, [model, model], images)
    assert_same(before, marks(model))
    assert model.feature is feature
    assert torch.equal(images, given)


@pytest.mark.parametrize("stage", ["trace", "guards"])
def test_also_where_the_forward_raises(stage: str) -> None:
    model, images = mixed(), torch.randn(2, 3, 8, 8)
    program = export_program(model, images)
    model.fails = True
    before = marks(model)
    with pytest.raises((PleasError, ValueError), match="on purpose"):
        trace(model, images) if stage == "trace" else check_forwards(program, [model], images)
    assert_same(before, marks(model))


def test_undisturbed_runs_in_evaluation_mode_and_puts_everything_back() -> None:
    model, images = mixed(), torch.randn(2, 3, 8, 8)
    before, stem, head = marks(model), model.stem, model.head
    weight = stem[0].get_parameter("weight")
    with undisturbed(model):
        assert not any(part.training for part in model.modules())
        assert not torch.is_grad_enabled()
        assert torch.equal(model(images), model(images))
        model.train()
        model(images)
        weight.data = torch.zeros_like(weight)
        stem[1].running_mean = torch.ones(6)
        head[2].get_parameter("bias").add_(1.0)
        model.new = nn.Linear(2, 2)  # type: ignore[assignment]
        torch.rand(3)
        torch.set_grad_enabled(True)
    assert_same(before, marks(model))
    assert stem[0].weight is weight


def test_undisturbed_restores_after_an_error() -> None:
    model = mixed()
    before = marks(model)
    with pytest.raises(KeyError):
        disturb_and_fail(model)
    assert_same(before, marks(model))


def disturb_and_fail(model: nn.Module) -> None:
    with undisturbed(model):
        model.train()
        model(torch.randn(2, 3, 8, 8))
        raise KeyError
