"""MobileNetV1 (arXiv 1704.04861) of a quarter of the width, with PReLU: `mobilenet025_{a,b}.safetensors`.

The slope of every PReLU is what tells parents trained with ReLU (0) from those trained with LeakyReLU (0.1). Names of
parameters are those of the checkpoints.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

WIDTHS = (8, 16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256)  # of the stem, then of every step
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


def _activated(convolution: nn.Conv2d) -> list[nn.Module]:
    width = convolution.out_channels
    return [convolution, nn.BatchNorm2d(width), nn.PReLU(width)]


def _step(width_in: int, width: int, stride: int) -> nn.Sequential:
    depthwise = nn.Conv2d(width_in, width_in, 3, stride, padding=1, groups=width_in, bias=False)
    pointwise = nn.Conv2d(width_in, width, 1, bias=False)
    return nn.Sequential(*_activated(depthwise), *_activated(pointwise))


class MobileNet(nn.Module):
    """(N, 3, 224, 224) -> logits (N, num_classes)."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_activated(nn.Conv2d(3, WIDTHS[0], 3, 2, padding=1, bias=False)))
        widths = zip(pairwise(WIDTHS), STRIDES, strict=True)
        self.steps = nn.Sequential(*(_step(*pair, stride) for pair, stride in widths))
        self.fc = nn.Linear(WIDTHS[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.steps(self.stem(x)).mean((2, 3)))


def mobilenet025(num_classes: int = 1000) -> MobileNet:
    return MobileNet(num_classes)
