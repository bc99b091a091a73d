from __future__ import annotations

from collections.abc import Callable

import torch

from datafree.proxy import ProxySet

Build = Callable[..., ProxySet]


def test_gaussian_noise_has_its_moments(build: Build) -> None:
    images = build(128, {"kind": "noise"}).batch(range(128)).float() / 255
    assert abs(float(images.mean()) - 0.5) < 0.005
    assert abs(float(images.std()) - 0.24) < 0.01  # 0.25 before clipping


def test_uniform_noise_uses_every_level(build: Build) -> None:
    images = build(128, {"kind": "noise", "form": "uniform"}).batch(range(128))
    counts = torch.bincount(images.flatten().long(), minlength=256)
    assert bool((counts > 0).all())
    assert abs(float(images.float().mean()) - 127.5) < 1
