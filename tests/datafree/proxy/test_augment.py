from __future__ import annotations

from collections.abc import Callable

import torch

from datafree.models.parent import Parent
from datafree.proxy import ProxySet
from datafree.proxy.augment import augment_lightly

Build = Callable[..., ProxySet]
MakeParent = Callable[..., Parent]


def test_augmentation_is_repeatable_and_leaves_global_randomness_alone() -> None:
    images = torch.randint(0, 256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    before = torch.get_rng_state()
    one = augment_lightly(images, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    assert torch.equal(augment_lightly(images, 5), one)
    assert not torch.equal(augment_lightly(images, 6), one)
    assert one.shape == images.shape
    assert one.dtype == torch.uint8


def test_augmented_images_are_what_is_cached(build: Build) -> None:
    plain = build(70, {"kind": "procedural"})
    changed = build(70, {"kind": "procedural", "augment": "light"})
    assert changed.fingerprint != plain.fingerprint
    assert build(70, {"kind": "procedural", "augment": "light"}).manifest[0].made == 0
    assert torch.equal(
        build(5, {"kind": "procedural", "augment": "light"}).batch(range(5)), changed.batch(range(5))
    )


def test_grey_images_keep_their_channel(build: Build, parent: MakeParent) -> None:
    grey = (parent("a", 1, channels=1), parent("b", 2, channels=1))
    proxies = build(5, {"kind": "noise", "augment": "light"}, parents=grey)
    assert proxies.batch(range(5)).shape == (5, 1, 16, 16)
