"""Tiny architectures, one for every structural trait the mathematics has to cope with.

CASES maps a name to a Case: `build()` gives a fresh module in evaluation mode, `example` the shape of its images.
Use `randomise` before comparing anything: fresh modules have zero biases and unit batch norms, which hide mistakes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A tiny architecture; `shape` is (N, C, H, W) of its example input."""

    build: Callable[[], nn.Module]
    shape: tuple[int, int, int, int] = (2, 3, 16, 16)

    def model(self, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        return randomise(self.build().eval(), generator)

    def example(self, seed: int = 0) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))


def randomise(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Random weights, affine parameters and statistics (in place), of a size that keeps activations of order one."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise.abs())
            elif name.endswith("running_mean"):
                tensor.copy_(0.3 * noise)
            elif isinstance(tensor, nn.Parameter) and tensor.dim() >= 2:
                tensor.copy_(noise * (2.0 / tensor[0].numel()) ** 0.5)
            elif isinstance(tensor, nn.Parameter):
                tensor.copy_((1.0 if name.endswith("weight") else 0.0) + 0.3 * noise)
    return model


def conv_bn(cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout), nn.ReLU(inplace=True))


class Residual(nn.Module):
    """x -> relu(shortcut(x) + branch(x)); the shortcut projects where the width or the stride changes."""

    def __init__(self, cin: int, cout: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.reduce = conv_bn(cin, cout, 1)
        self.spatial = conv_bn(cout, cout, 3, stride, groups)
        self.expand = nn.Sequential(nn.Conv2d(cout, cout, 1, bias=False), nn.BatchNorm2d(cout))
        same = cin == cout and stride == 1
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(cin, cout, 1, stride), nn.BatchNorm2d(cout))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.expand(self.spatial(self.reduce(x))))


class OptionA(nn.Module):
    """A CIFAR residual block whose shortcut subsamples and pads channels with zeros (He et al. 2016, option A)."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.first = conv_bn(cin, cout, 3, stride)
        self.second = nn.Sequential(nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout))
        self.grow, self.stride = (cout - cin) // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.grow or self.stride > 1:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.grow, self.grow))
        return F.relu(shortcut + self.second(self.first(x)))


class PreActivation(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))) (He et al. 2016, identity mappings)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width + 2, 3, padding=1, bias=False)
        self.bn2, self.conv2 = (
            nn.BatchNorm2d(width + 2),
            nn.Conv2d(width + 2, width, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x_in = x
        x = self.conv1(F.relu(self.bn1(x)))
        return x_in + self.conv2(F.relu(self.bn2(x), inplace=True))


class DenseLayer(nn.Module):
    """x -> cat(x, f(x)) (DenseNet)."""

    def __init__(self, cin: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(cin), nn.Conv2d(cin, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class Inverted(nn.Module):
    """Expand, depthwise, squeeze and excite, project: a MobileNetV3 block."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(
            nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish()
        )
        depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(hidden), nn.Hardswish())
        squeeze = [nn.Conv2d(hidden, 5, 1), nn.ReLU(), nn.Conv2d(5, hidden, 1), nn.Hardsigmoid()]
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), *squeeze)
        self.project = nn.Sequential(nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        return x + self.project(self.gate(y) * y)


class SharedConv(nn.Module):
    """One convolution used twice, and two names for one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared = conv_bn(3, 6), nn.Conv2d(6, 6, 3, padding=1)
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.again.weight = self.shared.weight
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.shared(x))
        x = F.relu(self.shared(x))
        return self.head(F.relu(self.again(x)).mean((2, 3)))


def pooled_head(width: int, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def plain() -> nn.Module:
    """Two convolutions with batch norm, flattened height and width, two linear layers (LeNet-like)."""
    features = nn.Sequential(conv_bn(1, 6), nn.MaxPool2d(2), conv_bn(6, 8), nn.MaxPool2d(2), nn.Flatten())
    return nn.Sequential(features, nn.Linear(8 * 4 * 4, 12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 5))


def plain_without_bn() -> nn.Module:
    convs = [
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 9, 3, stride=2),
        nn.LeakyReLU(),
        nn.AvgPool2d(2),
    ]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(9 * 3 * 3, 10), nn.Tanh(), nn.Linear(10, 4))


def residual() -> nn.Module:
    return nn.Sequential(conv_bn(3, 6), Residual(6, 6), Residual(6, 8, 2), Residual(8, 8), pooled_head(8))


def option_a() -> nn.Module:
    blocks = [OptionA(4, 4, 1), OptionA(4, 8, 2), OptionA(8, 8, 1), OptionA(8, 12, 2)]
    return nn.Sequential(conv_bn(3, 4), *blocks, pooled_head(12))


def grouped() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8), Residual(8, 12, 2, groups=3), Residual(12, 12, 1, groups=4), pooled_head(12)
    )


def depthwise() -> nn.Module:
    return nn.Sequential(conv_bn(3, 6, 3, 2), Inverted(6, 10), Inverted(6, 12), pooled_head(6))


def concatenating() -> nn.Module:
    first = nn.Sequential(DenseLayer(6, 4), DenseLayer(10, 4))
    transition = nn.Sequential(nn.BatchNorm2d(14), nn.ReLU(), nn.Conv2d(14, 7, 1), nn.AvgPool2d(2))
    return nn.Sequential(
        conv_bn(3, 6), first, transition, DenseLayer(7, 3), DenseLayer(10, 3), pooled_head(13)
    )


def pre_activation() -> nn.Module:
    body = [nn.Conv2d(3, 6, 3, padding=1), PreActivation(6), PreActivation(6), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*body, pooled_head(6))


CASES: dict[str, Case] = {
    "plain": Case(plain, (2, 1, 16, 16)),
    "plain_without_bn": Case(plain_without_bn),
    "residual": Case(residual),
    "option_a": Case(option_a),
    "grouped": Case(grouped),
    "depthwise": Case(depthwise),
    "concatenating": Case(concatenating),
    "pre_activation": Case(pre_activation),
    "shared_conv": Case(SharedConv),
}
