"""Targets by whose image it is: what shares do to a mean, and to a whole merge."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import pleas
from pleas.network.average import mean_of_owners
from pleas.plan.layout import plain_layout
from pleas.solve.propagate import held_out
from tests.merging import (
    SETTINGS,
    difference,
    evidence_of,
    images,
    outputs,
    parents,
    permuted_copy,
    relatives,
)

NEAR = replace(SETTINGS, ridge=1e-6, head_ridge=1e-6, propagate=1.0)


def merged(name: str, given: torch.Tensor | None, count: int = 2) -> pleas.MergeResult:
    evidence = replace(evidence_of(name, relatives(name, count), NEAR), given=given)
    return pleas.assemble(evidence, pleas.make_plan(evidence, budget=1.0))


def test_shares_weigh_a_mean_and_a_unit_of_one_owner_stays_its_own() -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    shares = [torch.tensor([1.0, 0.25]).view(2, 1, 1), torch.tensor([0.0, 0.75]).view(2, 1, 1)]
    found = mean_of_owners([a, b], {}, shares)
    assert torch.equal(found[0], a[0])
    torch.testing.assert_close(found[1], 0.25 * a[1] + 0.75 * b[1])
    layout = plain_layout(3, 2)
    masks = torch.tensor([3, 1, 2])
    found = mean_of_owners([a, b], {1: replace(layout, masks=masks)}, shares)
    assert torch.equal(found[0, 0], a[0, 0])
    assert torch.equal(found[:, 1], a[:, 1])
    assert torch.equal(found[:, 2], b[:, 2])  # of the first image, too, where b counts for nothing


@pytest.mark.parametrize("count", [2, 3])
def test_equal_shares_are_the_mean_bit_for_bit(count: int) -> None:
    one = merged("residual", None, count)
    other = merged("residual", torch.full((96, count), 1 / count), count)
    assert one.targets == other.targets == "mean"
    for name, value in one.module.state_dict().items():
        assert torch.equal(value, other.module.state_dict()[name]), name


def test_where_one_parent_counts_everywhere_it_comes_back() -> None:
    own = merged("residual", torch.tensor([[0.0, 1.0]]).repeat(96, 1))
    assert own.targets == "own"
    second, x = relatives("residual")[1], images("residual")
    assert difference(outputs(own.module, x), outputs(second, x)) < 0.02
    assert own.held_out_error is not None
    assert own.held_out_error < 1e-3


def test_each_parent_is_the_target_on_its_own_images() -> None:
    """One-hot shares, dealt in turn: what the last layer says of its target is the parents' own outputs."""
    given = torch.eye(2).repeat(48, 1)
    result = merged("residual", given)
    x = images("residual")
    both = torch.stack([outputs(parent, x) for parent in relatives("residual")])
    own = both[torch.arange(96) % 2, torch.arange(96)].double()
    held = held_out(96, NEAR.holdout, NEAR.seed)
    error = (outputs(result.module, x).double() - own)[held].square().sum()
    spread = (own[held] - own[held].mean(0)).square().sum()
    assert result.held_out_error == pytest.approx(float(error / spread), rel=1e-3)


@pytest.mark.parametrize("name", ["residual", "pre_activation"])
def test_a_merged_with_itself_is_a(name: str) -> None:
    a, x = parents(name)[0], images(name)
    settings = replace(SETTINGS, targets="own")
    for other in (a, permuted_copy(name)):
        result = pleas.merge([a, other], list(x.split(32)), budget=1.0, settings=settings)
        assert difference(outputs(result.module, x), outputs(a, x)) < 1e-3


def test_every_head_of_several_is_fitted_on_its_own_parents_images() -> None:
    """One-hot shares: a head's rows are those of a fit in which no other image is seen."""
    modules = relatives("residual", 2, 0.5)
    settings = replace(NEAR, heads="separate", ridge=1e-3)
    given = torch.eye(2).repeat(48, 1)
    evidence = replace(evidence_of("residual", modules, settings), given=given)
    result = pleas.assemble(evidence, pleas.make_plan(evidence, budget=1.0))
    x = images("residual")
    held = held_out(96, settings.holdout, settings.seed)
    found, answers = outputs(result.module, x), [outputs(parent, x) for parent in modules]
    count = answers[0].shape[1]
    error, spread = 0.0, 0.0
    for p in range(2):
        own = torch.arange(96) % 2 == p
        ours, theirs = found[:, p * count : (p + 1) * count], answers[p]
        fitted = own & ~held
        # Least squares with an intercept leaves no mean error on the rows it was fitted on.
        assert float((ours - theirs)[fitted].mean(0).abs().max()) < 1e-3 * float(theirs.std())
        error += float((ours - theirs)[own & held].square().sum())
        spread += float((theirs[own & held] - theirs[own & held].mean(0)).square().sum())
    assert result.held_out_error == pytest.approx(error / spread, rel=1e-3)
