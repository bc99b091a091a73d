"""Layers whose rows are units: linear maps over tokens, which act on a transposed tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import pleas
from pleas import MergeSettings, Parents
from pleas.errors import UnsupportedModel
from pleas.network.build import draw
from pleas.solve.propagate import held_out, propagate
from pleas.statistics.crossing import crossed_dims
from tests.cases import CASES, randomise
from tests.merging import shuffled
from tests.reference import ridge_by_lstsq

SETTINGS = MergeSettings(ridge=1e-6, positions=256, rows=1000, propagate=0.7)


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


def built(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    return randomise(build().eval(), torch.Generator().manual_seed(seed))


def pixels() -> Tensor:
    return torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def crossed(symmetry: pleas.Symmetry) -> dict[str, tuple[int, ...]]:
    """Dimensions of the inputs of linear layers along which units vary, where there are any."""
    nodes = symmetry.program.graph.nodes
    found = {
        str(n.args[1].target): crossed_dims(symmetry, n.args[0], -1 if "linear" in str(n.target) else 1)  # type: ignore[union-attr,arg-type]
        for n in nodes
        if str(n.target) in ("aten.linear.default", "aten.convolution.default")
    }
    return {name: dims for name, dims in found.items() if dims}


def test_rows_that_are_units_are_found_and_not_widened() -> None:
    symmetry = pleas.trace(built(OverTokens), pixels()[:2])
    assert crossed(symmetry) == {"rise.weight": (1,), "fall.weight": (1,)}
    channels = symmetry.classes[int(symmetry.axis("stem.weight", 0).cls[0])]
    hidden = symmetry.classes[int(symmetry.axis("rise.weight", 0).cls[0])]
    assert not channels.widenable
    assert "one weight for all of them" in channels.reason
    assert hidden.widenable


@pytest.mark.parametrize("name", ["residual", "grouped", "concatenating"])
def test_ordinary_networks_have_none(name: str) -> None:
    assert not crossed(pleas.trace(CASES[name].model(), CASES[name].example()))


def test_matching_reads_the_mean_over_rows_that_know_no_order() -> None:
    models, x = [built(OverTokens, seed) for seed in (0, 1)], pixels()
    statistics = pleas.collect(Parents.of(models, x[:2], SETTINGS), list(x.split(20)))
    means = torch.cat([_inputs(model, "fall", x).mean(1) for model in models], -1).double()
    found = statistics.units["fall.weight", 1]
    assert found.count == 64
    torch.testing.assert_close(found.covariance[0], means.T.cov(correction=0), rtol=1e-4, atol=1e-6)


def test_the_solve_pairs_the_rows_of_the_matched_parents() -> None:
    """Channel by channel in the common order: against dense least squares on explicit rows."""
    models, x = [built(OverTokens, seed).double() for seed in (0, 1)], pixels().double()
    evidence = pleas.gather(Parents.of(models, x[:2], replace(SETTINGS, ridge=1e-3)), list(x.split(20)))
    (solved,) = propagate(evidence, draw(evidence.parents, pleas.make_plan(evidence, budget=1.0)), [0.0])
    for model, state in zip(models, evidence.states, strict=True):
        model.load_state_dict({key: state.get(key, value) for key, value in model.state_dict().items()})
    kept = x[~held_out(64, SETTINGS.holdout, SETTINGS.seed)]
    z = sum(_inputs(model, "rise", kept) for model in models).flatten(0, 1) / 2  # type: ignore[union-attr]
    t = sum(m.rise(_inputs(m, "rise", kept)) for m in models).flatten(0, 1) / 2  # type: ignore[operator,union-attr]
    prior = sum(m.rise.weight for m in models) / 2  # type: ignore[operator,union-attr]
    damping = 1e-3 * float((z - z.mean(0)).square().mean())
    with torch.no_grad():
        dense = ridge_by_lstsq(z, t, prior, damping, intercept=True)
    torch.testing.assert_close(solved.layers["rise"].weight, dense, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("apart", "count"), [(0.0, 2), (0.5, 2), (1.0, 2), (0.5, 3)])
def test_permuted_copies_give_the_model_back(apart: float, count: int) -> None:
    a, x = built(OverTokens), pixels()
    copies = [shuffled(a, x[:2], seed) for seed in range(1, count)]
    result = pleas.merge([a, *copies], list(x.split(32)), apart=apart, settings=SETTINGS)
    with torch.no_grad():
        expected, found = a(x), result.module(x)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-3
    assert (result.ratio > 1) == (apart > 0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            InBatch,
            r"module 'rise' \(aten.linear.default\) has units in its batch dimension: the parents' rows cannot",
        ),
        (lambda: OverTokens(nn.BatchNorm1d(8)), r"module 'between' .* has units as its positions"),
    ],
)
def test_what_cannot_be_paired_is_refused(build: Callable[[], nn.Module], message: str) -> None:
    a, x = built(build), pixels()
    with pytest.raises(UnsupportedModel, match=message):
        pleas.merge([a, a], [x], budget=1.0, settings=SETTINGS)


def _inputs(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0]
