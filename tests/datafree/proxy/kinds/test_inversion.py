from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from torch import nn
from torch.nn import functional

from datafree.errors import RunError, UsageError
from datafree.models.parent import Parent
from datafree.proxy import InversionSpec, ProxySet, Request
from datafree.proxy.kinds.inversion import (
    Opponent,
    _Inversion,
    images_in_dispute,
    schedule,
    total_variation,
)
from datafree.proxy.kinds.targets import StatisticsLoss, Target

Build = Callable[..., ProxySet]
MakeParent = Callable[..., Parent]
PLAIN = {"kind": "inversion", "fit": False}  # from a start that is far from the statistics


def bn_loss_by_definition(parent: Parent, images: torch.Tensor) -> float:
    """L_BN from uint8 images, layer by layer, as the module's docstring writes it."""
    value = (images.double() / 255 - 0.5) / 0.25
    terms = []
    for layer in parent.module.double():  # pyright: ignore[reportGeneralTypeIssues]
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            mean, variance = value.mean((0, 2, 3)), value.var((0, 2, 3), correction=0)
            target = layer.running_var + layer.eps
            offset = (mean - layer.running_mean).square() / target
            terms.append((offset + torch.log((variance + layer.eps) / target).square()).mean())
        value = layer(value)
    parent.module.float()
    return float(torch.stack(terms).mean())


def test_the_reported_loss_is_the_definition(build: Build, parent: MakeParent) -> None:
    pair = (parent("a", 1), parent("b", 2))
    proxies = build(64, {"kind": "inversion", "steps": 3}, parents=pair)
    images = proxies.batch(range(64))
    for number, one in enumerate(pair):
        told = proxies.manifest[0].facts["bn_loss"][one.name]
        assert told == pytest.approx(bn_loss_by_definition(one, images[number::2]), rel=1e-4)


@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (7, 3, 9), (16, 3)])
def test_the_written_gradient_is_the_true_one(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    mean = torch.randn(3, generator=generator, dtype=torch.float64)
    variance = torch.rand(3, generator=generator, dtype=torch.float64) + 0.1

    def loss(value: torch.Tensor) -> torch.Tensor:
        term = StatisticsLoss.apply(value, mean, variance, 1e-5)
        assert isinstance(term, torch.Tensor)
        return term

    assert torch.autograd.gradcheck(loss, [value])


def test_more_steps_fit_the_statistics_better(build: Build) -> None:
    losses = [
        sum(build(64, {**PLAIN, "steps": steps}).manifest[0].facts["bn_loss"].values())
        for steps in (1, 10, 40)
    ]
    assert losses[2] < 0.5 * losses[1] < 0.5 * losses[0]


def test_split_deals_a_shard_to_the_parents_in_turn(build: Build, parent: MakeParent) -> None:
    """With b exchanged, a's images stay as they are: each half depends on its own parent only."""
    a = parent("a", 1)
    one = build(64, {"kind": "inversion", "steps": 3}, parents=(a, parent("b", 2))).batch(range(64))
    two = build(64, {"kind": "inversion", "steps": 3}, parents=(a, parent("b", 3))).batch(range(64))
    assert torch.equal(one[0::2], two[0::2])
    assert not torch.equal(one[1::2], two[1::2])


def test_joint_serves_both_parents_at_once(build: Build, parents: tuple[Parent, Parent]) -> None:
    joint = build(64, {"kind": "inversion", "steps": 40, "mode": "joint"})
    start = build(64, {"kind": "inversion", "steps": 1, "mode": "joint"})
    for one in parents:
        loss = bn_loss_by_definition(one, joint.batch(range(64)))
        assert joint.manifest[0].facts["bn_loss"][one.name] == pytest.approx(loss, rel=1e-4)
        assert loss < 0.5 * start.manifest[0].facts["bn_loss"][one.name]


def test_a_shard_depends_on_nothing_outside_it(parents: tuple[Parent, Parent], tmp_path: Path) -> None:
    request = Request(parents, (16, 16), 3, 0, tmp_path, torch.device("cpu"))
    source = InversionSpec(steps=2).bind(request)
    third = source.shard(2).images
    source.shard(0)
    assert torch.equal(source.shard(2).images, third)
    assert torch.equal(InversionSpec(steps=2).bind(request).shard(2).images, third)


def test_parents_are_left_as_they_were(build: Build, parents: tuple[Parent, Parent]) -> None:
    before = [{k: v.clone() for k, v in parent.module.state_dict().items()} for parent in parents]
    with torch.no_grad():
        build(64, {"kind": "inversion", "steps": 2})
    for parent, state in zip(parents, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in parent.module.state_dict().items())
        assert not any(module._forward_pre_hooks for module in parent.module.modules())
        assert not any(parameter.requires_grad for parameter in parent.module.parameters())
        assert not parent.module.training


def test_the_images_belong_to_the_parents_weights(build: Build, parent: MakeParent) -> None:
    build(64, {"kind": "inversion", "steps": 2}, parents=(parent("a", 1), parent("b", 2)))
    again = build(64, {"kind": "inversion", "steps": 2}, parents=(parent("a", 1), parent("b", 3)))
    assert again.manifest[0].made == 1


def test_a_network_without_batch_norm_is_refused(build: Build, parent: MakeParent) -> None:
    with pytest.raises(UsageError) as error:
        build(64, {"kind": "inversion"}, parents=(parent("a"), parent("b", norm=False)))
    assert str(error.value) == (
        "parent b (tests:small) cannot be inverted: it has no batch-norm layer with running statistics. Use "
        "another source: public images (kind: images), diffusion samples (kind: diffusion), or procedural "
        "images; or invert its predictions (loss: classes)"
    )


def test_a_network_that_was_never_trained_is_refused(build: Build, parent: MakeParent) -> None:
    with pytest.raises(UsageError, match="all its 2 batch-norm layers still have mean 0 and variance 1"):
        build(64, {"kind": "inversion"}, parents=(parent("a"), parent("b", trained=False)))


def test_single_untrained_layers_are_left_out_and_said(build: Build, parent: MakeParent) -> None:
    a = parent("a", 1)
    assert isinstance(a.module, nn.Sequential)
    layer = a.module[1]
    assert isinstance(layer, nn.BatchNorm2d)
    layer.reset_running_stats()
    proxies = build(64, {"kind": "inversion", "steps": 2}, parents=(a, parent("b", 2)))
    assert proxies.notes == (
        "parent a: 1 of 2 batch-norm layers were never trained (mean 0, variance 1) and are left out of the "
        "inversion: 1",
    )


def test_a_loss_that_is_not_finite(build: Build, parent: MakeParent) -> None:
    a = parent("a", 1)
    assert isinstance(a.module, nn.Sequential)
    layer = a.module[0]
    assert isinstance(layer, nn.Conv2d)
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(RunError, match="inversion of a met a loss that is not finite at step 1: lower"):
        build(64, {"kind": "inversion", "steps": 2}, parents=(a, parent("b", 2)))


@pytest.fixture
def target(parents: tuple[Parent, Parent]) -> Target:
    return Target.of(parents[0])


def test_pixels_meet_the_parents_own_normalisation(target: Target) -> None:
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(target.pixels_in(images.float() / 255), target.parent.preprocess(images))


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    rates = [schedule(step, 60) for step in range(60)]
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[5:]))
    assert rates[-1] < 0.01
    assert schedule(0, 1) == 1


def test_total_variation_counts_neighbours() -> None:
    step = torch.zeros(1, 1, 2, 2)
    step[..., 1] = 1
    assert float(total_variation(step)) == 1.0
    assert float(total_variation(torch.ones(1, 1, 3, 3))) == 0.0


def test_joint_says_what_each_parent_would_reach_alone(build: Build) -> None:
    proxies = build(64, {"kind": "inversion", "steps": 10, "mode": "joint"})
    alone = proxies.manifest[0].facts["bn_loss_alone"]
    assert set(alone) == {"a", "b"}
    assert all(value > 0 for value in alone.values())


def test_joint_warns_where_no_image_suits_both(build: Build, parent: MakeParent) -> None:
    a, b = parent("a", 1), parent("b", 1)
    assert isinstance(b.module, nn.Sequential)
    layer = b.module[1]
    assert isinstance(layer, nn.BatchNorm2d)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean += 3 * layer.running_var.sqrt()  # the same network, statistics of other images
    proxies = build(64, {"kind": "inversion", "steps": 30, "mode": "joint"}, parents=(a, b))
    (note,) = proxies.notes
    assert note.startswith("joint inversion: no images suit both parents' statistics (loss of a ")
    assert note.endswith("trained on different kinds of images; mode: split serves each by its own")


# Options beside the defaults --------------------------------------------------------------------------------


def test_steps_at_half_the_size_come_first(
    build: Build, parents: tuple[Parent, Parent], monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = []
    real = _Inversion._adam

    def seen(
        self: _Inversion, pixels: torch.Tensor, targets: Any, generator: Any, steps: int, number: int
    ) -> Any:
        sides.append((pixels.shape[-1], steps))
        return real(self, pixels, targets, generator, steps, number)

    monkeypatch.setattr(_Inversion, "_adam", seen)
    build(64, {"kind": "inversion", "steps": 10, "coarse": 0.3}, parents=parents[:1])
    assert sides == [(8, 3), (16, 7)]


def test_a_parent_that_cannot_take_half_the_size(build: Build, parent: MakeParent) -> None:
    fixed = parent("a", 1)
    with pytest.raises(UsageError) as error:
        build(
            64,
            {"kind": "inversion", "steps": 10, "coarse": 0.5},
            parents=(replace(fixed, module=FixedSize(fixed.module)),),
        )
    assert str(error.value) == (
        "coarse: parent a cannot take images of half the side, 8 x 8 (this network takes 16 x 16): remove "
        "coarse from proxy.sources"
    )


class FixedSize(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != 16:
            raise ValueError("this network takes 16 x 16")
        return self.inner(x)


def test_the_descent_stops_where_the_loss_is_small_enough(build: Build) -> None:
    def loss(**keys: Any) -> float:
        proxies = build(64, {"kind": "inversion", "steps": 60, "jitter": 0, "flip": False, **keys})
        return float(proxies.manifest[0].facts["bn_loss"]["a"])

    free, stopped = loss(), loss(enough=0.3)
    assert free < stopped < 0.35


def test_images_can_be_asked_to_belong_to_classes_in_turn(
    build: Build, parents: tuple[Parent, Parent]
) -> None:
    def entropy(weight: float) -> float:
        source = {"kind": "inversion", "steps": 60, "class_weight": weight}
        images = build(64, source, parents=parents[:1]).batch(range(64))
        logits = parents[0].module(parents[0].preprocess(images))
        return float(functional.cross_entropy(logits, torch.arange(64) % 5))

    assert entropy(1.0) < entropy(0.0) - 0.1


def test_a_network_without_batch_norm_is_inverted_by_its_predictions(
    build: Build, parent: MakeParent
) -> None:
    pair = (parent("a", 1, norm=False), parent("b", 2, norm=False))
    proxies = build(128, {"kind": "inversion", "loss": "classes", "steps": 40}, parents=pair)
    start = build(128, {"kind": "procedural"}, parents=pair)
    for number, one in enumerate(pair):
        labels = torch.arange(64) % 5  # 32 of each parent in a shard: the classes go on in the second one

        def loss(
            images: ProxySet, number: int = number, one: Parent = one, labels: torch.Tensor = labels
        ) -> float:
            mine = images.batch(range(number, 128, 2))
            return float(functional.cross_entropy(one.module(one.preprocess(mine)), labels))

        assert loss(proxies) < loss(start) - 0.05
    assert set(proxies.manifest[0].facts) == {"class_loss", "steps"}


def test_two_class_terms_are_refused() -> None:
    with pytest.raises(pydantic.ValidationError, match="with loss: classes remove it"):
        InversionSpec(loss="classes", class_weight=0.1)


def test_options_at_their_defaults_leave_shards_their_names() -> None:
    assert InversionSpec().meaning() == InversionSpec(coarse=0.0).meaning()
    assert not {"coarse", "enough", "class_weight", "share"} & set(InversionSpec().meaning())
    assert InversionSpec(steps=20, coarse=0.5).meaning()["coarse"] == 0.5


def test_half_precision_is_for_gpus_alone(build: Build) -> None:
    images = [
        build(64, {"kind": "inversion", "steps": 3, "half": half}).batch(range(64)) for half in (False, True)
    ]
    assert torch.equal(*images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_half_precision_fits_the_statistics_on_a_gpu(build: Build) -> None:
    spec = {"kind": "inversion", "steps": 20}
    exact, half = (
        build(64, {**spec, "half": half}, device="cuda").manifest[0].facts["bn_loss"]
        for half in (False, True)
    )
    assert all(half[name] < 1.5 * exact[name] for name in exact)


def test_disagreement_is_the_jensen_shannon_divergence(parents: tuple[Parent, Parent]) -> None:
    a, b = parents
    opponent = Opponent(b.module, b.preprocess, {"a": slice(0, b.outputs)}, 1.0)
    pixels = torch.rand(6, *a.preprocess.shape, generator=torch.Generator().manual_seed(1))
    logits = a.module((pixels - 0.5) / 0.25).detach()
    p, q = functional.softmax(logits, 1), functional.softmax(b.module((pixels - 0.5) / 0.25).detach(), 1)
    middle = (p + q) / 2
    expected = ((p * (p / middle).log()).sum(1) + (q * (q / middle).log()).sum(1)).mean() / 2
    assert float(opponent.disagreement(pixels, "a", logits)) == pytest.approx(float(expected), rel=1e-4)


def test_networks_disagree_more_on_images_sought_for_that(
    parents: tuple[Parent, Parent], tmp_path: Path
) -> None:
    a, b = parents
    columns = {"a": slice(0, a.outputs), "b": slice(0, b.outputs)}
    size = (a.preprocess.size[0], a.preprocess.size[1])
    request = Request(parents, size, a.preprocess.channels, 3, tmp_path, torch.device("cpu"))
    found = []
    for weight in (1e-6, 30.0):
        opponent = Opponent(b.module, b.preprocess, columns, weight)
        images = images_in_dispute(InversionSpec(steps=20), request, opponent, 64)
        assert images.shape == (64, *a.preprocess.shape)
        pixels = images[0::2].float() / 255  # those of parent a
        logits = a.module((pixels - 0.5) / 0.25)
        found.append(float(opponent.disagreement(pixels, "a", logits).detach()))
    assert found[1] > 1.5 * found[0]
