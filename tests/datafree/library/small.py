"""Two small trained-looking networks and images for them, for the library's tests and the examples in its docs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PREPROCESS = {"size": 8, "mean": [0.5], "std": [0.25]}


def small(seed: int) -> nn.Module:
    """Grey 8 x 8 to ten classes, its batch norms with statistics of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
        )  # fmt: skip
        for _ in range(20):
            network(torch.randn(32, 1, 8, 8))
    return network


def pixels(count: int, seed: int = 0) -> Tensor:
    """Smooth uint8 (count, 1, 8, 8)."""
    coarse = torch.rand(count, 1, 3, 3, generator=torch.Generator().manual_seed(seed))
    smooth = nn.functional.interpolate(coarse, (8, 8), mode="bilinear", align_corners=True)
    return (255 * smooth).round().to(torch.uint8)


def inputs(count: int, seed: int = 0) -> Tensor:
    """The same normalised, float32."""
    return (pixels(count, seed).float() / 255 - 0.5) / 0.25
