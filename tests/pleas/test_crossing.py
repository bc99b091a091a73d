"""Layers whose rows are units: linear maps over tokens, which act on a transposed tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pleas
from pleas import MergeSettings
from pleas.crossing import crossed_layers, crossed_nodes, needs_matching
from pleas.errors import UnsupportedModel
from pleas.symmetry import permute_state, position_maps, random, state_of
from tests.cases import CASES, randomise

SETTINGS = MergeSettings(ridge=1e-6, positions=256, rows=1000)


class OverTokens(nn.Module):
    """Patches, a two-layer map over the 16 tokens of every channel, a head; `between` sees (N, channels, hidden)."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.rise, self.fall = nn.Linear(16, 10), nn.Linear(10, 16)
        self.between = between or nn.GELU()
        self.mix, self.head = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2)
        x = x + self.fall(self.between(self.rise(x)))
        return self.head(torch.relu(self.mix(x.transpose(1, 2))).mean(1))


class InBatch(nn.Module):
    """The channels move into the batch dimension before a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.rise, self.head = nn.Linear(16, 10), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(0, 1)
        x = torch.relu(self.rise(x)).transpose(0, 1)
        return self.head(x.mean(2))


def traced(build: Callable[[], nn.Module]) -> tuple[nn.Module, pleas.Symmetry, Tensor]:
    model = randomise(build().eval(), torch.Generator().manual_seed(0))
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    return model, pleas.trace(model, images[:2]), images


def test_rows_that_are_units_are_found_and_not_widened() -> None:
    _, symmetry, _ = traced(OverTokens)
    assert [layer.name for layer in crossed_layers(symmetry)] == ["rise", "fall"]
    assert set(crossed_nodes(symmetry).values()) == {(1,)}
    channels = symmetry.classes[int(symmetry.axis("stem.weight", 0).cls[0])]
    hidden = symmetry.classes[int(symmetry.axis("rise.weight", 0).cls[0])]
    assert not channels.widenable
    assert "one weight for all of them" in channels.reason
    assert hidden.widenable


@pytest.mark.parametrize("name", ["plain", "grouped", "shared_conv"])
def test_ordinary_networks_have_none(name: str) -> None:
    case = CASES[name]
    symmetry = pleas.trace(case.model(), case.example())
    assert not crossed_nodes(symmetry)
    assert all(layer.groups > 1 for layer in needs_matching(symmetry))


def test_the_second_pass_pairs_the_rows_of_the_matched_parents() -> None:
    """Joint moments = those of A's rows beside B's, B's channels put in A's order and its inputs left in its own."""
    a, symmetry, images = traced(OverTokens)
    b = randomise(copy.deepcopy(a), torch.Generator().manual_seed(1))
    matching = random(symmetry, torch.Generator().manual_seed(2))
    first = pleas.collect(symmetry, a, b, list(images.split(32)), SETTINGS)
    assert {"rise", "fall"} <= set(first.units)
    assert not {"rise", "fall"} & set(first.joint)
    both = pleas.collect_grouped(symmetry, first, matching, a, b, list(images.split(20)), SETTINGS)
    order = position_maps(symmetry, matching)["stem.weight", 0]
    seen = [_inputs(parent, "fall", images) for parent in (a, b)]
    rows = torch.cat([seen[0], seen[1][:, order]], -1).flatten(0, 1).double()
    torch.testing.assert_close(
        both.joint["fall"].covariance[0], rows.T.cov(correction=0), rtol=1e-4, atol=1e-6
    )
    means = torch.cat([x.mean(1) for x in seen], -1).double()
    torch.testing.assert_close(
        first.units["fall"].covariance[0], means.T.cov(correction=0), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("apart", [0.0, 0.5, 1.0])
def test_a_permuted_copy_gives_the_model_back(apart: float) -> None:
    a, symmetry, images = traced(OverTokens)
    b = copy.deepcopy(a)
    drawn = random(symmetry, torch.Generator().manual_seed(3))
    b.load_state_dict(permute_state(symmetry, state_of(symmetry.program, a), drawn))
    result = pleas.merge(a, b, list(images.split(32)), apart=apart, settings=SETTINGS)
    with torch.no_grad():
        expected, found = a(images), result.module(images)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-3
    assert (result.ratio > 1) == (apart > 0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (InBatch, r"module 'rise' \(aten.linear.default\) has units in its batch dimension"),
        (lambda: OverTokens(nn.BatchNorm1d(8)), r"module 'between' .* has units as its positions"),
    ],
)
def test_what_cannot_be_paired_is_refused(build: Callable[[], nn.Module], message: str) -> None:
    a, symmetry, images = traced(build)
    with pytest.raises(UnsupportedModel, match=message):
        pleas.collect(symmetry, a, a, [images], SETTINGS)


def _inputs(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0]
