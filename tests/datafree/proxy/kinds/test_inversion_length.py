"""How long an inversion goes on, and what it starts from."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pydantic
import pytest
import torch
from torch import nn

from datafree.models.parent import Parent
from datafree.proxy import InversionSpec, ProxySet, Request
from datafree.proxy.kinds.inversion import _Inversion
from datafree.proxy.kinds.starts import fit_colours
from datafree.proxy.kinds.targets import Target

Build = Callable[..., ProxySet]
MakeParent = Callable[..., Parent]


def norms(parent: Parent) -> list[nn.BatchNorm2d]:
    return [layer for layer in parent.module.modules() if isinstance(layer, nn.BatchNorm2d)]


def remember(parent: Parent, pixels: torch.Tensor) -> None:
    """The parent's batch norms take the statistics of these pixels for those of its training data."""
    for layer in norms(parent):
        layer.momentum = 1.0
        layer.train()
    parent.module((pixels - 0.5) / 0.25)
    for layer in norms(parent):
        layer.eval()


def smooth(count: int, seed: int) -> torch.Tensor:
    """Images whose positions are correlated and whose brightness and contrast differ, as photographs' do."""
    generator = torch.Generator().manual_seed(seed)
    blobs = nn.functional.interpolate(
        torch.rand(count, 3, 4, 4, generator=generator), (16, 16), mode="bilinear"
    )
    light = torch.rand(count, 1, 1, 1, generator=generator)
    return (blobs * light + 0.5 * torch.rand(count, 1, 1, 1, generator=generator)).clamp(0, 1)


def test_the_goal_is_the_loss_that_chance_leaves_real_images(parent: MakeParent) -> None:
    """In place of the formula: batches of 128 of the very images whose statistics are remembered."""
    one = parent("a", 1)
    population = smooth(8192, 3)
    remember(one, population)
    target = Target.of(one)
    batches = population.split(128)
    measured = torch.stack([target.loss(batch) for batch in batches]).mean()
    told = torch.tensor([target.sampling_error(batch) for batch in batches]).mean()
    assert float(told) == pytest.approx(float(measured), rel=0.1)


def test_positions_of_one_image_do_not_count_as_images(parent: MakeParent) -> None:
    """Enlarged images have more positions and tell no more: the goal stays where it was."""
    target = Target.of(parent("a", 1))
    images = smooth(32, 4)
    small = target.sampling_error(images)
    large = target.sampling_error(images.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert large == pytest.approx(small, rel=0.25)
    assert target.sampling_error(torch.cat([images, images])) == pytest.approx(small / 2, rel=0.05)


def test_the_descent_ends_where_the_goal_is_reached(build: Build) -> None:
    facts = build(64, {"kind": "inversion"}).manifest[0].facts
    for name in ("a", "b"):
        assert facts["bn_loss"][name] <= facts["bn_loss_goal"][name]
        assert 20 <= facts["steps"][name] < 600
        assert not facts["cut_off"][name]


def test_a_harder_start_takes_more_steps(build: Build, parents: tuple[Parent, Parent]) -> None:
    def steps(**keys: object) -> float:
        source = {"kind": "inversion", **keys}
        return build(64, source, parents=parents[:1]).manifest[0].facts["steps"]["a"]

    assert steps() < steps(start="noise", fit=False, rate=0.01)


def test_how_long_depends_on_the_shard_alone(parents: tuple[Parent, Parent], tmp_path: Path) -> None:
    request = Request(parents, (16, 16), 3, 0, tmp_path, torch.device("cpu"))
    source = InversionSpec().bind(request)
    third = source.shard(2)
    source.shard(0)
    for again in (source.shard(2), InversionSpec().bind(request).shard(2)):
        assert torch.equal(again.images, third.images)
        assert again.facts == third.facts


def test_a_loss_that_is_still_high_at_the_cap_is_said(build: Build, parents: tuple[Parent, Parent]) -> None:
    source = {"kind": "inversion", "start": "noise", "fit": False, "max_steps": 5}
    proxies = build(64, source, parents=parents[:1])
    (note,) = proxies.notes
    assert re.sub(r"\d+\.\d{3}", "N", note) == (
        "inversion of parent a did not converge: it was cut off at 5 steps with a batch-norm loss of N, where as many "
        "images of its training data would have about N, so its images are poor proxies: raise max_steps (5) in "
        "proxy.sources, or use public images (kind: images)"
    )


def test_statistics_that_no_image_has_are_said(build: Build, parent: MakeParent) -> None:
    one = parent("a", 1)
    last = norms(one)[-1]
    assert last.running_mean is not None
    assert last.running_var is not None
    last.running_mean += 50 * last.running_var.sqrt()
    proxies = build(64, {"kind": "inversion"}, parents=(one,))
    (note,) = proxies.notes
    assert "parent a did not converge: it got no further after " in note
    assert note.endswith(
        "set start: noise or another rate in proxy.sources, or use public images (kind: images)"
    )


def test_one_sentence_for_many_shards(build: Build, parents: tuple[Parent, Parent]) -> None:
    source = {"kind": "inversion", "start": "noise", "fit": False, "max_steps": 2}
    assert len(build(192, source, parents=parents[:1]).notes) == 1


def test_a_number_of_steps_is_still_a_number(build: Build) -> None:
    proxies = build(64, {"kind": "inversion", "steps": 3, "max_steps": 2})
    assert proxies.manifest[0].facts["steps"] == {"a": 3, "b": 3}
    assert not proxies.notes


def test_rounds_are_as_long_as_the_loss_asks_for_and_the_best_images_are_kept(
    parents: tuple[Parent, Parent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps; twice as many; 2.5 - 1 times 60; as many as the 150 before. The round that made them worse ends it."""
    request = Request(parents, (16, 16), 3, 0, tmp_path, torch.device("cpu"))
    source = InversionSpec().bind(request)
    assert isinstance(source, _Inversion)
    lengths: list[int] = []
    ratios = iter([9.0, 2.5, 1.2, 1.3])

    def adam(
        pixels: torch.Tensor, targets: object, generator: object, steps: int, number: int
    ) -> tuple[torch.Tensor, int]:
        lengths.append(steps)
        return pixels + 1, steps

    monkeypatch.setattr(source, "_adam", adam)
    monkeypatch.setattr(source, "_ratio", lambda *_: next(ratios))
    pixels, taken, cut_off = source._rounds(torch.zeros(1), [], torch.Generator(), 0)
    assert lengths == [20, 40, 90, 150]
    assert (float(pixels), taken, cut_off) == (3.0, 300, False)


def test_a_share_of_an_unknown_number_of_steps() -> None:
    with pytest.raises(pydantic.ValidationError, match="it needs a number: write steps, or remove coarse"):
        InversionSpec(coarse=0.5)


@pytest.mark.parametrize("low", [True, False])
def test_the_start_takes_the_colours_of_the_first_batch_norm(parent: MakeParent, low: bool) -> None:
    """Statistics of images on black, or of dull greenish ones: the start's own are far from both."""
    one = parent("a", 1)
    images = smooth(256, 5)
    known = (
        (3 * images - 1.5).clamp(0, 1) if low else 0.2 * images + torch.tensor([0.1, 0.5, 0.2]).view(3, 1, 1)
    )
    remember(one, known)
    target = Target.of(one)
    start = torch.rand(64, 3, 1, 1, generator=torch.Generator().manual_seed(1)) * smooth(64, 6)
    found = fit_colours(start, [target])
    assert float(target.first_term(found)) < 0.1 * float(target.first_term(start))
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert not found.requires_grad


def test_grey_starts_are_fitted_too(parent: MakeParent) -> None:
    target = Target.of(parent("a", 1, channels=1))
    start = smooth(64, 7).mean(1, keepdim=True) * 0.2
    assert float(target.loss(fit_colours(start, [target]))) < 0.5 * float(target.loss(start))


def test_a_start_that_no_recolouring_betters_is_left(parent: MakeParent) -> None:
    one = parent("a", 1)
    first = one.module.get_submodule("0")
    assert isinstance(first, nn.Conv2d)
    first.weight.zero_()  # the first batch norm sees nothing of the image
    start = smooth(8, 8)
    assert torch.equal(fit_colours(start, [Target.of(one)]), start)


def test_the_first_term_is_that_of_the_first_layer(parent: MakeParent) -> None:
    one = parent("a", 1)
    target, pixels = Target.of(one), smooth(16, 9)
    value = one.module.get_submodule("0")((pixels - 0.5) / 0.25)
    layer = norms(one)[0]
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean, variance = value.mean((0, 2, 3)), value.var((0, 2, 3), correction=0)
    known = layer.running_var + layer.eps
    expected = (mean - layer.running_mean).square() / known + torch.log(
        (variance + layer.eps) / known
    ).square()
    assert float(target.first_term(pixels)) == pytest.approx(float(expected.mean()), rel=1e-4)
