from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from datafree.diagnosis.observe import Observation, agreement, observe, watch
from datafree.models.parent import Parent
from datafree.proxy import ProxySet

Build = Callable[..., ProxySet]
MakeParent = Callable[..., Parent]
CPU = torch.device("cpu")


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(seed)).byte()


def test_distances_are_those_of_the_whole_set_whatever_the_batches(parent: MakeParent) -> None:
    one, pixels = parent("a", 1), images(50)
    assert isinstance(one.module, nn.Sequential)
    convolution, norm = one.module[0], one.module[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    value = convolution(one.preprocess(pixels)).double()
    mean, spread = value.mean((0, 2, 3)), value.var((0, 2, 3), correction=0) + norm.eps
    stored = norm.running_var.double() + norm.eps
    for size in (50, 7):
        found = observe(one, pixels.split(size), CPU).norms[0]
        assert found.layer == "1"
        assert found.mean == pytest.approx(
            float(((mean - norm.running_mean).square() / stored).mean().sqrt())
        )
        assert found.log_var == pytest.approx(float((spread / stored).log().abs().mean()), rel=1e-4)


def test_the_entropy_is_that_of_the_mean_prediction(parent: MakeParent) -> None:
    one, pixels = parent("a", 1), images(40)
    mean = one.module(one.preprocess(pixels)).softmax(1).mean(0)
    seen = observe(one, [pixels], CPU)
    assert seen.entropy == pytest.approx(float(torch.distributions.Categorical(mean).entropy()), rel=1e-4)
    assert seen.entropy_limit == pytest.approx(math.log(5))
    assert observe(one, [pixels[:3]], CPU).entropy_limit == pytest.approx(math.log(3))
    assert torch.equal(seen.predictions, one.module(one.preprocess(pixels)).argmax(1))


def test_a_network_without_batch_norm_has_no_distances(parent: MakeParent) -> None:
    seen = observe(parent("a", norm=False), [images(4)], CPU)
    assert seen.norms == ()
    assert (seen.bn_mean, seen.bn_log_var) == (None, None)


class WithAuxiliary(nn.Module):
    """A head of its own in training, as GoogLeNet has."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.auxiliary = body, nn.Sequential(nn.BatchNorm2d(3), nn.Flatten())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.auxiliary(x).mean() if self.training else self.body(x)


def test_a_batch_norm_that_runs_in_training_alone_is_left_out(parent: MakeParent) -> None:
    one, pixels = parent("a", 1), images(20)
    module = WithAuxiliary(one.module).eval()
    seen = observe(replace(one, module=module), pixels.split(8), CPU)
    assert [norm.layer for norm in seen.norms] == ["body.1", "body.4"]
    assert seen.bn_log_var == observe(one, pixels.split(8), CPU).bn_log_var


def test_the_network_is_left_as_it_was(parent: MakeParent) -> None:
    one = parent("a", 1)
    observe(one, [images(4)], CPU)
    assert not any(module._forward_pre_hooks for module in one.module.modules())


def test_agreement_counts_equal_predictions() -> None:
    one = Observation("a", (), 0.0, 1.0, torch.tensor([0, 1, 2, 3]))
    two = replace(one, predictions=torch.tensor([0, 1, 3, 2]))
    assert agreement([one, two]) == 0.5
    three = replace(one, predictions=torch.tensor([0, 3, 2, 3]))
    assert agreement([one, three]) == 0.75
    assert agreement([one, two, three]) == 0.25, "all of them, not each with the first"


def test_inverted_images_are_closer_than_noise(build: Build, parents: tuple[Parent, Parent]) -> None:
    sets = [build(64, {"kind": "inversion", "steps": 30}), build(64, {"kind": "noise"})]
    inverted, noise = ([observe(one, each.batches(64), CPU) for one in parents] for each in sets)
    for near, far in zip(inverted, noise, strict=True):
        assert near.bn_log_var is not None
        assert far.bn_log_var is not None
        assert near.bn_log_var < 0.5 * far.bn_log_var


def test_two_passes_add_up_to_one(parent: MakeParent) -> None:
    one, pixels = parent("a", 1), images(40)
    both = (watch(one, [pixels[:13]], CPU) + watch(one, [pixels[13:]], CPU)).observation()
    whole = observe(one, [pixels], CPU)
    assert both.entropy == pytest.approx(whole.entropy)
    assert both.norms[0].log_var == pytest.approx(whole.norms[0].log_var)
    assert torch.equal(both.predictions, whole.predictions)
