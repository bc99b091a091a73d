"""Augmentation in image space, once, before the cache: both parents see the same pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def augment_lightly(images: Tensor, seed: int) -> Tensor:
    """Random crop (35 % of the area at least), mirroring and mild colour change of uint8 (n, c, h, w) images.

    kornia draws from the global generator, so it is seeded for the while and put back afterwards. A shard is
    always augmented whole: the draws of one image depend on its shard, not on who reads it.
    """
    from kornia.augmentation import (
        AugmentationSequential,
        ColorJitter,
        RandomHorizontalFlip,
        RandomResizedCrop,
    )

    height, width = images.shape[-2:]
    changes = [RandomResizedCrop((height, width), scale=(0.35, 1.0)), RandomHorizontalFlip()]
    if images.shape[1] == 3:
        changes.append(ColorJitter(0.2, 0.2, 0.2, 0.05, p=0.8))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        pixels = AugmentationSequential(*changes, data_keys=["input"])(images.float() / 255)
    assert isinstance(pixels, Tensor)
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
