from __future__ import annotations

from collections.abc import Callable

import pydantic
import pytest
import torch

from datafree.proxy import ProceduralSpec, ProxySet
from datafree.proxy.kinds.procedural import Mix, paint
from datafree.proxy.kinds.textures import TEXTURES

Build = Callable[..., ProxySet]


def draw(name: str, n: int, size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return TEXTURES[name](n, *size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", TEXTURES)
@pytest.mark.parametrize("size", [(8, 8), (16, 16), (28, 28), (33, 20)])
def test_images_are_in_range_varied_and_repeatable(name: str, size: tuple[int, int]) -> None:
    images = draw(name, 6, size)
    assert images.shape == (6, 3, *size)
    assert images.dtype == torch.float32
    assert bool(images.isfinite().all())
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    assert float(images.std((1, 2, 3)).mean()) > 0.05  # not flat
    assert len({image.numpy().tobytes() for image in images}) == 6
    assert torch.equal(draw(name, 6, size), images)
    assert not torch.equal(draw(name, 6, size, seed=1), images)


@pytest.mark.parametrize("name", [name for name in TEXTURES if name != "warp"])
def test_spectra_fall_as_those_of_photographs_do(name: str) -> None:
    """Power at low frequencies is well above power at high ones, unlike noise."""
    grey = draw(name, 16, (32, 32)).mean(1)
    power = torch.fft.rfft2(grey - grey.mean((1, 2), keepdim=True)).abs().square().mean(0)
    assert float(power[1:3, 1:3].mean()) > 5 * float(power[12:16, 12:16].mean())


def test_a_mix_is_fair_in_every_prefix_and_drawn_from_the_generators() -> None:
    only = Mix(fractals=0, leaves=0, network=0, fbm=0, warp=3, spectrum=0)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(paint(only, 5, (16, 16), generator), draw("warp", 5, (16, 16)))


def test_painting_moves_no_global_randomness() -> None:
    before = torch.get_rng_state()
    paint(Mix(), 8, (16, 16), torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_mix_changes_the_images(build: Build) -> None:
    one = build(8, {"kind": "procedural"})
    two = build(8, {"kind": "procedural", "mix": {"fractals": 0}})
    assert one.fingerprint != two.fingerprint


def test_a_mix_of_nothing() -> None:
    with pytest.raises(pydantic.ValidationError, match="every generator of the mix has weight 0"):
        ProceduralSpec(mix=Mix(fractals=0, leaves=0, network=0, fbm=0, warp=0))
