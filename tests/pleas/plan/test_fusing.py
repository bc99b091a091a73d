"""What fusing costs, against regressions done the long way; in which order units come apart."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

import pleas
from pleas import Evidence, FusingCosts, MergeSettings, Parents
from pleas.plan.fusing import MOST_PARTIAL, priced_masks
from pleas.plan.layout import everyone, owners
from tests.merging import evidence_of, parents, permuted_copy, relatives

EVERY_ROW = MergeSettings(ridge=1e-6, rows=10_000)


def of_two_layers(count: int) -> tuple[Evidence, Tensor]:
    """Relatives of one hidden layer."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)) for _ in range(count)]
    for net in nets[1:]:
        for first, own in zip(nets[0].parameters(), net.parameters(), strict=True):
            own.data = 0.8 * first.data + 0.6 * own.data
    x = torch.randn(4000, 6, generator=torch.Generator().manual_seed(2))
    return pleas.gather(Parents.of(nets, x[:2], EVERY_ROW), list(x.split(500))), x


@pytest.mark.parametrize("count", [2, 3])
def test_costs_are_what_regressions_gain_by_seeing_the_difference(count: int) -> None:
    """For every set of owners, owner and unit: regress the reader's outputs on the fused units, with and without what
    this owner's unit loses by fusing."""
    evidence, x = of_two_layers(count)
    (hidden,) = evidence.costs.error
    modules, alignments = evidence.parents.modules, evidence.alignments
    with torch.no_grad():
        reads = [m[:2](x).double()[:, a[hidden].perm] for m, a in zip(modules, alignments, strict=True)]  # type: ignore[index]
    readers = [state["2.weight"].double() for state in evidence.states]
    scale = sum(float((u @ w.T).var(0, correction=0).sum()) for u, w in zip(reads, readers, strict=True))

    def left_by(columns: Tensor, targets: Tensor) -> float:
        centred, aim = columns - columns.mean(0), targets - targets.mean(0)
        fit = torch.linalg.lstsq(centred, aim).solution
        return float((aim - centred @ fit).square().mean(0).sum())

    assert sorted(evidence.costs.error[hidden]) == priced_masks(count)
    for mask, found in evidence.costs.error[hidden].items():
        held = owners(mask)
        fused = torch.stack([reads[p] for p in held]).mean(0)
        gained = torch.zeros(5).double()
        for p in held:
            lost = reads[p] - fused
            nothing = left_by(fused, lost @ readers[p].T)
            for u in range(5):
                gained[u] += nothing - left_by(torch.cat([fused, lost[:, u : u + 1]], 1), lost @ readers[p].T)
        # The costs are damped by a thousandth of the mean variance, the regressions are not.
        torch.testing.assert_close(found, gained / scale, rtol=5e-2, atol=1e-6)


@pytest.mark.parametrize("name", ["residual", "grouped"])
def test_permuted_copies_are_wholly_similar_and_cost_nothing(name: str) -> None:
    modules = (parents(name)[0], permuted_copy(name, 3), permuted_copy(name, 4))
    costs = evidence_of(name, modules).costs
    for c, of_class in costs.similarity.items():
        for similarity in of_class.values():
            # 1 at every site where the unit is alive: a constant one correlates with nothing, itself included
            torch.testing.assert_close(similarity, similarity.round(), rtol=1e-4, atol=1e-4)
            assert float(similarity.min()) > 0.5
        assert all(float(error.sum()) < 1e-4 for error in costs.error[c].values())


def test_similarities_are_those_of_the_matched_units() -> None:
    """Of relatives that only moved a little, every pair of parents is alike in every unit."""
    costs = evidence_of("residual", relatives("residual", 3, 0.05)).costs
    for of_class in costs.similarity.values():
        assert sorted(of_class) == [(0, 1), (0, 2), (1, 2)]
        sites = max(float(similarity.max()) for similarity in of_class.values())
        assert all(float(similarity.min()) > 0.4 * sites for similarity in of_class.values())


def test_the_least_similar_pairs_come_apart_first_and_of_equals_the_dearest() -> None:
    error, similarity = torch.tensor([1.0, 3.0, 2.0, 9.0]), torch.tensor([0.5, 0.2, 0.2, 0.9])
    costs = FusingCosts({7: {3: error}}, {7: {(0, 1): similarity}}, 2)
    splits = costs.splits()[7]
    assert [split.unit for split in splits] == [1, 2, 0, 3]
    assert all((split.whole, split.parts) == (3, (1, 2)) for split in splits)
    assert [split.saves for split in splits] == [3, 2, 1, 9]


def by_hand(error: dict[int, float], alike: dict[tuple[int, int], float], count: int) -> FusingCosts:
    one = {mask: torch.tensor([value]) for mask, value in error.items()}
    return FusingCosts({0: one}, {0: {pair: torch.tensor([s]) for pair, s in alike.items()}}, count)


def test_of_three_the_stranger_leaves_first() -> None:
    """A and B are alike, C is not: the unit becomes {A, B} and {C}, and only then A and B part."""
    error = {0b011: 0.1, 0b101: 2.0, 0b110: 2.0, 0b111: 3.0}
    costs = by_hand(error, {(0, 1): 0.9, (0, 2): 0.1, (1, 2): 0.2}, 3)
    first, second = costs.splits()[0]
    assert (first.whole, set(first.parts)) == (0b111, {0b011, 0b100})
    assert (second.whole, set(second.parts)) == (0b011, {0b001, 0b010})
    assert first.saves == pytest.approx(2.9)
    assert second.saves == pytest.approx(0.1)
    assert first.similarity == pytest.approx(0.15)  # the mean of the pairs that it parts
    assert second.similarity == pytest.approx(0.9)


def test_of_units_that_cost_nothing_the_least_alike_part_first() -> None:
    """Constant units: the order of parents does not decide."""
    for stranger, pair in ((2, (0, 1)), (0, (1, 2)), (1, (0, 2))):
        alike = {p: 0.9 if p == pair else 0.1 for p in combinations(range(3), 2)}
        first = by_hand(dict.fromkeys(priced_masks(3), 0.0), alike, 3).splits()[0][0]
        assert 1 << stranger in first.parts


def test_of_four_two_pairs_part_in_the_middle() -> None:
    error = dict.fromkeys(priced_masks(4), 5.0) | {0b0011: 0.0, 0b1100: 0.0, 0b1111: 9.0}
    costs = by_hand(error, dict.fromkeys(combinations(range(4), 2), 0.5), 4)
    first, *rest = costs.splits()[0]
    assert set(first.parts) == {0b0011, 0b1100}
    assert len(rest) == 2


def test_beyond_a_few_parents_all_part_at_once() -> None:
    assert MOST_PARTIAL == 4
    assert priced_masks(5) == [0b11111]
    costs = by_hand({0b11111: 2.0}, dict.fromkeys(combinations(range(5), 2), 0.5), 5)
    (split,) = costs.splits()[0]
    assert split.parts == (1, 2, 4, 8, 16)
    assert split.saves == 2


def test_a_later_split_of_a_unit_waits_for_its_earlier_ones() -> None:
    """Every prefix of a class's splits is a partition of every unit, down to every parent by itself."""
    splits = evidence_of("residual", parents("residual", 3)).splits
    for chosen in splits.values():
        now: dict[int, list[int]] = {}
        for split in chosen:
            masks = now.setdefault(split.unit, [everyone(3)])
            masks.remove(split.whole)  # raises where an earlier split has not made it
            assert sum(split.parts) == split.whole
            masks += split.parts
        assert all(sorted(masks) == [1, 2, 4] for masks in now.values())
        size = len({split.unit for split in chosen})
        assert len(chosen) == 2 * size


def test_what_splits_save_adds_up_to_what_fusing_costs() -> None:
    evidence = evidence_of("residual", parents("residual", 3))
    for c, chosen in evidence.splits.items():
        assert sum(split.saves for split in chosen) == pytest.approx(float(evidence.costs.error[c][7].sum()))
