"""Small parents for proxy sources: a few hundred weights, and batch-norm layers that have seen images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from datafree.cache.store import content_hash
from datafree.images.preprocess import Preprocess
from datafree.models.parent import Parent
from datafree.proxy import ProxySet, ProxySpec, build_proxies

MakeParent = Callable[..., Parent]
Build = Callable[..., ProxySet]


def make_parent(
    name: str, seed: int = 0, size: int = 16, channels: int = 3, norm: bool = True, trained: bool = True
) -> Parent:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in ((channels, 6), (6, 8)):
        layers.append(nn.Conv2d(before, after, 3, padding=1, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm2d(after))
        layers.append(nn.ReLU())
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    preprocess = Preprocess((size, size), (0.5,) * channels, (0.25,) * channels)
    if norm and trained:  # smooth images, as photographs are: their statistics become the running ones
        coarse = torch.rand(64, channels, size // 4, size // 4, generator=generator)
        images = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
        for layer in module:
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 1.0
        module.train()
        with torch.no_grad():
            module((images - 0.5) / 0.25)
    module = module.eval().requires_grad_(False)
    return Parent(
        name=name,
        module=module,
        preprocess=preprocess,
        outputs=5,
        classes=None,
        reference="tests:small",
        arguments={},
        weights=None,
        fingerprint=content_hash(module.state_dict()),
        notes=(),
    )


@pytest.fixture(scope="session")
def parents() -> tuple[Parent, Parent]:
    return make_parent("a", 1), make_parent("b", 2)


@pytest.fixture
def build(parents: tuple[Parent, Parent], tmp_path: Path) -> Build:
    """`build(count, {"kind": ...}, ..., seed=0)` with the small parents and a cache of the test's own."""

    def call(count: int, *sources: dict[str, Any], **options: Any) -> ProxySet:
        spec = ProxySpec.model_validate({"count": count, "sources": sources})
        settings: dict[str, Any] = {
            "parents": parents,
            "seed": 0,
            "cache": tmp_path / "cache",
            "base": tmp_path,
            **options,
        }
        return build_proxies(spec, **settings)

    return call


@pytest.fixture
def parent() -> MakeParent:
    """`parent(name, seed=0, size=16, channels=3, norm=True, trained=True)`: one more small parent."""
    return make_parent
