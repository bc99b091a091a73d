"""Which pairs a plan keeps apart first, and what it says fusing costs, against regressions done the long way."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import pleas
from pleas import FusingCosts, MergeSettings
from tests.pleas.test_merge import SETTINGS, images, parents, permuted_copy, traced

EVERY_ROW = MergeSettings(ridge=1e-6, rows=10_000)


def costs_of(name: str, a: nn.Module, b: nn.Module) -> FusingCosts:
    batches = images(name).split(32)
    statistics = pleas.collect(traced(name), a, b, batches, SETTINGS)
    matching = pleas.match(traced(name), statistics, a, b, SETTINGS)
    statistics = pleas.collect_grouped(traced(name), statistics, matching, a, b, batches, SETTINGS)
    return pleas.fusing_costs(traced(name), statistics, matching, a, b)


def test_the_least_similar_pairs_are_kept_apart_first_and_of_equals_the_dearest() -> None:
    error, similarity = torch.tensor([1.0, 3.0, 2.0, 9.0]), torch.tensor([0.5, 0.2, 0.2, 0.9])
    costs = FusingCosts({7: error}, {7: similarity})
    assert costs.order()[7].tolist() == [1, 2, 0, 3]


def test_a_plan_fuses_the_most_similar_pairs() -> None:
    a, b = parents("residual")
    symmetry, x = traced("residual"), images("residual").split(32)
    statistics = pleas.collect(symmetry, a, b, x, SETTINGS)
    matching = pleas.match(symmetry, statistics, a, b, SETTINGS)
    costs = pleas.fusing_costs(symmetry, statistics, matching, a, b)
    plan = pleas.make_plan(symmetry, statistics, matching, a, b, SETTINGS, apart=0.5, costs=costs)
    for c, similarity in costs.similarity.items():
        made = plan.classes[c]
        assert len(made.apart) == len(similarity) // 2
        assert similarity[made.fused].min() >= similarity[made.apart].max()


def test_a_permuted_copy_is_wholly_similar_and_costs_nothing() -> None:
    for name in ("residual", "grouped"):
        costs = costs_of(name, parents(name)[0], permuted_copy(name))
        for c, similarity in costs.similarity.items():
            # 1 at every site where the unit is alive: a constant one correlates with nothing, itself included
            torch.testing.assert_close(similarity, similarity.round(), rtol=1e-4, atol=1e-4)
            assert float(similarity.min()) > 0.5
            assert float(costs.error[c].sum()) < 1e-5


def two_layers(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def test_costs_are_what_a_regression_gains_by_seeing_the_difference() -> None:
    """For every unit: regress both readers' outputs on the fused units, with and without d = (a - b) / 2."""
    a, b = two_layers(0), two_layers(1)
    for ours, theirs in zip(next(iter(a)).parameters(), next(iter(b)).parameters(), strict=True):
        theirs.data = 0.8 * ours.data + 0.6 * theirs.data
    x = torch.randn(4000, 6, generator=torch.Generator().manual_seed(2))
    symmetry = pleas.trace(a, x[:2])
    statistics = pleas.collect(symmetry, a, b, x.split(500), EVERY_ROW)
    matching = pleas.match(symmetry, statistics, a, b, EVERY_ROW)
    costs = pleas.fusing_costs(symmetry, statistics, matching, a, b)
    (hidden,) = costs.error
    with torch.no_grad():
        units_a, units_b = a[:2](x).double(), b[:2](x).double()[:, matching[hidden].perm]
        readers = [m.state_dict()["2.weight"].double() for m in (a, b)]
        readers[1] = readers[1][:, matching[hidden].perm]
    fused, lost = (units_a + units_b) / 2, (units_a - units_b) / 2
    targets = torch.cat([(lost @ w.T) for w in readers], 1)
    scale = sum(
        float((u @ w.T).var(0, correction=0).sum()) for u, w in zip((units_a, units_b), readers, strict=True)
    )

    def left_by(columns: Tensor) -> float:
        centred, aim = columns - columns.mean(0), targets - targets.mean(0)
        fit = torch.linalg.lstsq(centred, aim).solution
        return float((aim - centred @ fit).square().mean(0).sum())

    nothing = left_by(fused)
    gained = [(nothing - left_by(torch.cat([fused, lost[:, u : u + 1]], 1))) / scale for u in range(5)]
    # The costs are damped by a thousandth of the mean variance, the regressions are not.
    torch.testing.assert_close(costs.error[hidden], torch.tensor(gained).double(), rtol=5e-2, atol=1e-6)
