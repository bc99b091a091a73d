"""Plans under a budget: used up, monotone, and every unit of every parent in exactly one merged unit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import pleas
from pleas import Evidence
from pleas.errors import InputError
from pleas.plan.cost import FlopModel
from tests.merging import NAMES, SEPARATE, SETTINGS, evidence_of, parents


def evidence(count: int = 2, name: str = "residual") -> Evidence:
    return evidence_of(name, parents(name, count))


def test_a_plan_fuses_the_most_similar_pairs() -> None:
    known = evidence()
    plan = pleas.make_plan(known, apart=0.5)
    for c, similarity in known.costs.similarity.items():
        made = plan.classes[c]
        fused = made.sources[0][made.masks == 3]
        apart = made.sources[0][made.masks == 1]
        assert len(apart) == int(0.5 * made.size + 0.5)
        assert similarity[0, 1][fused].min() >= similarity[0, 1][apart].max()


@pytest.mark.parametrize(
    ("name", "count"), [*((name, 2) for name in NAMES), ("residual", 3), ("residual", 5)]
)
def test_every_unit_of_every_parent_has_one_place(name: str, count: int) -> None:
    known = evidence(count, name)
    for apart in (0.0, 0.3, 1.0):
        for c, made in pleas.make_plan(known, apart=apart).classes.items():
            assert made.size == known.parents.symmetry.classes[c].size
            for p in range(count):
                owned = (made.masks >> p & 1).bool()
                assert made.sources[p][owned].sort().values.tolist() == list(range(made.size))


@pytest.mark.parametrize("allocation", ["error", "uniform", "zip", "early"])
@pytest.mark.parametrize("count", [2, 3])
def test_every_allocation_spends_its_budget(allocation: Any, count: int) -> None:
    known = evidence(count)
    for budget in (1.5, count - 0.2):
        plan = pleas.make_plan(known, budget=budget, allocation=allocation)
        assert budget - 0.15 < plan.ratio <= budget


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("allocation", ["error", "uniform", "zip", "early"])
def test_more_budget_never_predicts_more_error(count: int, allocation: Any) -> None:
    known = evidence(count)
    budgets = [1.01 + (count - 1.01) * step / 6 for step in range(7)]
    plans = [pleas.make_plan(known, budget=budget, allocation=allocation) for budget in budgets]
    assert [plan.flops for plan in plans] == sorted(plan.flops for plan in plans)
    errors = [plan.predicted_error or 0.0 for plan in plans]
    assert errors == sorted(errors, reverse=True)
    assert abs(errors[-1]) < 1e-9 * (plans[-1].at_stake or 1)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_whole_budget_keeps_everything_apart(count: int) -> None:
    known = evidence(count)
    whole, apart = pleas.make_plan(known, budget=count), pleas.make_plan(known, apart=1.0)
    assert whole.flops == apart.flops == count * whole.parent_flops
    assert whole.ratio == count
    assert whole.share_apart == apart.share_apart == 1


def test_one_times_prices_nothing() -> None:
    """No costs are computed where there is nothing to choose."""
    known = pleas.gather(evidence().parents, evidence().inputs, statistics=evidence().statistics)
    for plan in (pleas.make_plan(known, budget=1.0), pleas.make_plan(known, apart=0)):
        assert plan.ratio == 1
        assert plan.share_apart == 0
        assert plan.predicted_error is None
    assert "costs" not in vars(known)


def test_late_layers_first_and_early_layers_first() -> None:
    known = evidence()
    zipped, early = (pleas.make_plan(known, budget=1.3, allocation=one) for one in ("zip", "early"))
    classes = list(known.costs.error)
    by_depth = sorted(classes, key=FlopModel(known.parents.symmetry, 2).depth)
    for plan, order in ((early, by_depth), (zipped, by_depth[::-1])):
        shares = [plan.classes[c].share_apart for c in order]
        assert shares[0] > 0.5  # what one class leaves of the budget goes to the next that fits
        half = len(shares) // 2
        assert sum(shares[:half]) > sum(shares[half:])


def test_the_error_allocation_saves_at_least_as_much_as_the_uniform_one() -> None:
    for count in (2, 3):
        plans = [
            pleas.make_plan(evidence(count), budget=1.5, allocation=allocation)
            for allocation in ("error", "uniform")
        ]
        assert (plans[0].saved or 0) >= (plans[1].saved or 0)


def test_separate_heads_are_one_output_class_of_all() -> None:
    known = evidence_of("residual", parents("residual", 3), SEPARATE)
    plan = pleas.make_plan(known, budget=1.0)
    (output,) = known.parents.symmetry.output
    assert plan.classes[output].parts == (5, 5, 5)
    assert plan.classes[output].masks.tolist() == [1] * 5 + [2] * 5 + [4] * 5
    assert plan.ratio > 1  # three heads on one trunk: the narrowest network there is
    assert pleas.make_plan(known, budget=3).ratio == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"budget": 2.5},
            r"budget = 2.5: must lie between 1.0 \(one parent\) and 2.0 \(all 2 side by side\)",
        ),
        ({"budget": 0.9}, "budget = 0.9: must lie between 1.0"),
        ({"budget": float("nan")}, "budget = nan: must lie between"),
        ({"apart": -0.1}, "apart = -0.1: must lie between 0"),
        ({"apart": 1.1}, "apart = 1.1: must lie between 0"),
        ({}, r"give exactly one of budget \(multiply-adds, 1.0 to 2.0\) and apart"),
        ({"budget": 1.5, "apart": 0.5}, "give exactly one of budget"),
    ],
)
def test_impossible_plans_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pleas.make_plan(evidence(), **given)
    if given == {"budget": 2.5}:
        assert pleas.make_plan(evidence(3), **given).ratio <= 2.5


def test_the_settings_name_the_allocation() -> None:
    by_settings = evidence_of("residual", parents("residual"), replace(SETTINGS, allocation="zip"))
    expected = pleas.make_plan(evidence(), budget=1.4, allocation="zip")
    found = pleas.make_plan(by_settings, budget=1.4)
    for c, made in expected.classes.items():
        assert torch.equal(found.classes[c].masks, made.masks)
