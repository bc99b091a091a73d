"""One structural trait at a time: the classes that must be found, and the gate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pleas.symmetry import Symmetry, UnitClass, trace
from tests.cases import randomise


class Micro(nn.Module):
    """conv 3 -> width, some middle part, mean over space, linear -> 4."""

    def __init__(self, middle: Callable[[Tensor], Tensor], width: int = 8, out: int | None = None) -> None:
        super().__init__()
        self.conv, self.middle = nn.Conv2d(3, width, 3, padding=1), middle
        self.head = nn.Linear(width if out is None else out, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self.conv(x))
        return self.head(y.mean((2, 3)) if y.dim() == 4 else y)


def classes(symmetry: Symmetry) -> list:
    """(size, inner classes of a unit) of every class but the output."""

    def shape(cls: UnitClass) -> int | tuple:
        return (cls.size, *map(shape, cls.children[0])) if cls.children else cls.size

    return [shape(c) for k, c in enumerate(symmetry.classes) if k not in symmetry.output]


def traced(model: nn.Module, size: int = 6) -> Symmetry:
    randomise(model.eval(), torch.Generator().manual_seed(0))
    symmetry = trace(model, torch.randn(2, 3, size, size), rewrites=())
    assert symmetry.gate_error < 1e-12
    return symmetry


class Gated(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.inner, self.act = nn.Conv2d(8, 8, 1), act

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.act(self.inner(x))], 1)


class ChannelsLast(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, y: Tensor) -> Tensor:
        return self.inner(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


MICRO: dict[str, tuple[Callable[[], nn.Module], list]] = {
    "flatten CHW": (lambda: Micro(lambda y: y.flatten(1), out=288), [8]),
    "flatten HWC": (lambda: Micro(lambda y: y.permute(0, 2, 3, 1).flatten(1), out=288), [8]),
    "flatten H C W": (lambda: Micro(lambda y: y.transpose(1, 2).flatten(1), out=288), [8]),
    "gated linear unit": (lambda: Micro(lambda y: F.glu(y, 1), out=4), [4]),
    "halves added": (lambda: Micro(lambda y: y[:, :4] + y[:, 4:], out=4), [4]),
    "halves added, one squared": (lambda: Micro(lambda y: y[:, :4] + y[:, 4:] ** 2, out=4), [4]),
    "y + flip(y)": (lambda: Micro(lambda y: torch.tanh(y + y.flip(1))), [4]),
    "y + roll(y) leaves nothing": (lambda: Micro(lambda y: y + torch.tanh(y.roll(1, 1))), []),
    "cat(y, f(y))": (lambda: Micro(Gated(), out=16), [8, 8]),
    "cat(y, -y) with relu": (lambda: Micro(lambda y: F.relu(torch.cat([y, -y], 1)), out=16), [8]),
    "one channel picked out": (lambda: Micro(lambda y: y * torch.sigmoid(y[:, 2:3])), [7]),
    "a slice of channels": (lambda: Micro(lambda y: y[:, 3:6], out=3), [3, 5]),
    "prelu": (lambda: Micro(nn.PReLU(8)), [8]),
    "prelu with one weight": (lambda: Micro(nn.PReLU()), [8]),
    "transposed convolution": (lambda: Micro(nn.ConvTranspose2d(8, 5, 2, 2), out=5), [8, 5]),
    "grouped transposed convolution": (
        lambda: Micro(nn.ConvTranspose2d(8, 6, 2, 2, groups=2), out=6),
        [(2, 4, 3)],
    ),
    "depthwise": (lambda: Micro(nn.Conv2d(8, 8, 3, groups=8)), [8]),
    "depth multiplier 2": (lambda: Micro(nn.Conv2d(8, 16, 3, groups=8), out=16), [(8, 2)]),
    "grouped": (lambda: Micro(nn.Conv2d(8, 6, 3, groups=2), out=6), [(2, 4, 3)]),
    "two grouped in a row": (
        lambda: Micro(nn.Sequential(nn.Conv2d(8, 8, 1, groups=4), nn.Conv2d(8, 8, 1, groups=2)), out=8),
        [(2, (2, 2, 2), 4)],  # groups of the first lie inside those of the second
    ),
    "group norm": (lambda: Micro(nn.GroupNorm(4, 8)), [(4, 2)]),
    "group norm with one group": (lambda: Micro(nn.GroupNorm(1, 8)), [8]),
    "instance norm": (lambda: Micro(nn.InstanceNorm2d(8, affine=True)), [8]),
    "layer norm over (C, H, W)": (lambda: Micro(nn.LayerNorm([8, 6, 6])), [8]),
    "channels last layer norm": (lambda: Micro(ChannelsLast(nn.LayerNorm(8))), [8]),
    "channels last linear": (lambda: Micro(ChannelsLast(nn.Linear(8, 5)), out=5), [8, 5]),
    "pixel unshuffle": (lambda: Micro(nn.PixelUnshuffle(2), out=32), [8]),
    "pixel shuffle, then mean": (lambda: Micro(nn.PixelShuffle(2), out=2), [(2, 4)]),
    "pixel shuffle, then convolution": (
        lambda: Micro(nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(2, 5, 3)), out=5),
        [2, 5],
    ),
    "channel shuffle between grouped convolutions": (
        lambda: Micro(
            nn.Sequential(nn.Conv2d(8, 8, 1, groups=2), nn.ChannelShuffle(2), nn.Conv2d(8, 8, 1, groups=2)),
            out=8,
        ),
        [(2, 2, 2, 4), 4, 4],  # a 2 x 2 grid of groups: one of its two factors is kept
    ),
    "channel attention": (
        lambda: Micro(
            lambda y: ((y.flatten(2) @ y.flatten(2).mT).softmax(-1) @ y.mean((2, 3))[..., None]).squeeze(-1),
            out=8,
        ),
        [8],
    ),
    "channel statistics": (lambda: Micro(lambda y: y / y.norm(dim=1, keepdim=True)), [8]),
    "maximum of channels": (lambda: Micro(lambda y: y - y.amax(1, keepdim=True)), [8]),
    "constant bias per channel": (lambda: Micro(lambda y: y + torch.arange(8.0)[:, None, None]), []),
    "constant factor per channel": (lambda: Micro(lambda y: y * torch.ones(8).cumsum(0)[:, None, None]), []),
    "padded channels": (lambda: Micro(lambda y: F.pad(y, [0, 0, 0, 0, 1, 2]), out=11), [3, 8]),
    "cat with a map of one channel": (
        lambda: Micro(lambda y: torch.cat([y, y.mean(1, True)], 1), out=9),
        [8],
    ),
    "cat with zeros": (lambda: Micro(lambda y: torch.cat([y, torch.zeros(2, 3, 6, 6)], 1), out=11), [3, 8]),
    "repeated channels": (lambda: Micro(lambda y: y.repeat_interleave(2, 1), out=16), [(8, 2)]),
    "tiled channels": (lambda: Micro(lambda y: y.repeat(1, 2, 1, 1), out=16), [(8, 2)]),
    "permuted channels": (lambda: Micro(lambda y: y[:, torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])]), [8]),
    "upsampled": (lambda: Micro(lambda y: F.interpolate(y, scale_factor=2, mode="bilinear")), [8]),
    "stacked and summed": (lambda: Micro(lambda y: torch.stack([y, y.tanh()], 1).sum(1)), [8]),
    "einsum with itself": (
        lambda: Micro(lambda y: torch.einsum("nchw,nchw->nhw", y, y.tanh())[:, None] * y),
        [8],
    ),
    "weight norm": (
        lambda: Micro(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 5, 1)), out=5),
        [8, 5],
    ),
}
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "cumulative sum": lambda: Micro(lambda y: y.cumsum(1)),
    "sort": lambda: Micro(lambda y: y.sort(1)[0]),
    "argmax": lambda: Micro(lambda y: y * y.mean((2, 3)).argmax(1)[:, None, None, None]),
}


@pytest.mark.parametrize("name", MICRO)
def test_classes_of(name: str) -> None:
    build, expected = MICRO[name]
    symmetry = traced(build())
    assert not symmetry.unlisted
    assert sorted(classes(symmetry), key=str) == sorted(expected, key=str)


@pytest.mark.parametrize("name", REFUSED)
def test_order_of_channels_is_fixed_by(name: str) -> None:
    symmetry = traced(REFUSED[name]())
    assert classes(symmetry) == []
    assert [u.parameters[:1] for u in symmetry.unlisted] == [("conv.weight",)]
    assert "has no symmetry rule" in symmetry.fixed["conv.weight", 0]


def test_convolution_over_the_channel_axis_fixes_it() -> None:
    class Eca(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 3, padding=1)

        def forward(self, y: Tensor) -> Tensor:
            return y * torch.sigmoid(self.conv(y.mean((2, 3))[:, None])).mT[..., None]

    assert classes(traced(Micro(Eca()))) == []


def test_a_tied_weight_used_twice_ties_both_sides() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.b.weight = self.a.weight

        def forward(self, y: Tensor) -> Tensor:
            return torch.tanh(self.b(torch.tanh(self.a(y))))

    assert classes(traced(Micro(Tied()))) == [8]


def test_an_lstm_unrolled_by_export() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 5, batch_first=True)

        def forward(self, y: Tensor) -> Tensor:
            return self.lstm(y.flatten(2).mT)[0][:, -1]

    assert classes(traced(Micro(Recurrent(), out=5), size=2)) == [8, 5]


class ShuffleUnit(nn.Module):
    """Grouped 1x1, shuffle, depthwise, grouped 1x1; added to the input or beside it (ShuffleNet, Zhang et al. 2018)."""

    def __init__(
        self, inputs: int, outputs: int, groups: int, first: bool = False, grows: bool = True
    ) -> None:
        super().__init__()
        middle = 2 * groups**2 if outputs < 16 * groups else 4 * groups**2
        self.groups, self.grows = 1 if first else groups, grows
        self.reduce = nn.Conv2d(inputs, middle, 1, groups=self.groups)
        self.depthwise = nn.Conv2d(middle, middle, 3, 1 + grows, 1, groups=middle)
        self.expand = nn.Conv2d(middle, outputs - inputs * grows, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.reduce(x)).unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        y = self.expand(F.relu(self.depthwise(y)))
        return F.relu(torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1) if self.grows else y + x)


@pytest.mark.parametrize("groups", [2, 3])
def test_shuffled_groups_one_after_another(groups: int) -> None:
    """Groups of five layers cross one another: which of them are given up is decided on all crossings, not some."""
    width = 4 * groups
    units = [
        ShuffleUnit(width, 2 * width, groups, first=True),
        ShuffleUnit(2 * width, 2 * width, groups, grows=False),
        ShuffleUnit(2 * width, 4 * width, groups),
    ]
    traced(Micro(nn.Sequential(*units), width, 4 * width))
