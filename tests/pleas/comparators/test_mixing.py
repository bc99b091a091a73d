"""Units that are zipped, aligned by linear maps and matched around cycles, by hand and by trying everything."""

from __future__ import annotations

import itertools

import pytest
import torch

import pleas
from pleas import InputError
from pleas.comparators.cca import CCAMerge, aligning_map
from pleas.comparators.cycles import C2M3
from pleas.comparators.mixing import mean_correlation, not_mixable
from pleas.comparators.zipit import ZipIt, zip_units
from tests.merging import difference, evidence_of, images, outputs, parents, permuted_copy
from tests.pleas.comparators.small import gathered, linear, merged, state

X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [1.0, 3.0]])
A = ([[1.0, 0.0], [0.0, 2.0]], [[1.0, 3.0], [5.0, 7.0]])
SWAPPED = ([[0.0, 2.0], [1.0, 0.0]], [[3.0, 1.0], [7.0, 5.0]])
SIMILAR = torch.tensor(
    [[1.0, 0.9, 0.8, 0.1], [0.9, 1.0, 0.2, 0.7], [0.8, 0.2, 1.0, 0.3], [0.1, 0.7, 0.3, 1.0]],
    dtype=torch.float64,
)  # units a1 a2 b1 b2


def test_without_merges_within_a_parent_zipping_pairs_units() -> None:
    assert zip_units(SIMILAR, 2, 0.3, 0.0).tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]


def test_the_most_similar_units_of_one_parent_are_merged_within_its_budget() -> None:
    """a1 a2 first; with b1 and b2 that has min(0.8, 0.2) and min(0.1, 0.7), times 0.3: less than b1 with b2."""
    assert zip_units(SIMILAR, 2, 0.3, 1.0).tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]


def test_three_parents_are_zipped_into_one_size() -> None:
    similar = torch.full((6, 6), 0.1, dtype=torch.float64)
    for group in ((0, 3, 4), (1, 2, 5)):
        for u, v in itertools.permutations(group, 2):
            similar[u, v] = 0.9
    assert zip_units(similar, 3, 0.5, 0.0).tolist() == [[1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1]]


def test_correlations_by_hand() -> None:
    """Hidden units relu(x_0), relu(2 x_1) and relu(2 x_1), relu(x_0): what is read and written correlates alike."""
    evidence = gathered([linear(*A), linear(*SWAPPED)], [X])
    found = mean_correlation(evidence.parents.symmetry, evidence.statistics, 2, _hidden(evidence))
    expected = torch.corrcoef(torch.stack([X[:, 0], X[:, 1], X[:, 1], X[:, 0]]).double())
    torch.testing.assert_close(found, expected)


def _hidden(evidence: pleas.Evidence) -> int:
    return next(c for c in range(2) if c not in evidence.parents.symmetry.output)


def test_zipping_within_a_parent_averages_what_it_gives_and_adds_what_it_reads() -> None:
    """Both units of a are one, both of b are one: groups {a1 a2} and {b1 b2}."""
    a, b = linear([[1.0, 0.0], [1.0, 0.0]], [[1.0, 3.0]]), linear([[0.0, 1.0], [0.0, 3.0]], [[5.0, 7.0]])
    found = state(merged(ZipIt(beta=1.0), gathered([a, b], [X])))
    torch.testing.assert_close(found["0.weight"], torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    torch.testing.assert_close(found["2.weight"], torch.tensor([[4.0 / 2, 12.0 / 2]]))


@pytest.mark.parametrize("method", [ZipIt(beta=0.0), C2M3(), CCAMerge(ridge=1e-9)])
def test_a_permuted_copy_is_the_network_itself(method: ZipIt) -> None:
    found = state(merged(method, gathered([linear(*A), linear(*SWAPPED)], [X])))
    torch.testing.assert_close(found["0.weight"], torch.tensor(A[0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["2.weight"], torch.tensor(A[1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [ZipIt(beta=0.0), C2M3(start="matched")])
def test_a_permuted_copy_of_a_real_architecture_keeps_its_function(method: ZipIt) -> None:
    name = "depthwise"
    a = pleas.reestimate_bn(parents(name)[0], [images(name)])
    evidence = evidence_of(name, (a, pleas.reestimate_bn(permuted_copy(name), [images(name)])))
    x = images(name, 8, seed=9)
    assert difference(outputs(merged(method, evidence), x), outputs(a, x)) < 0.05


def test_what_is_not_zipped_stays_apart() -> None:
    """Nothing zipped: the ensemble. Heads of their own: the parents side by side."""
    a, b = linear(*A), linear([[1.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [2.0, 1.0]])
    found = merged(ZipIt(zipped=0.0), gathered([a, b], [X]))
    torch.testing.assert_close(outputs(found, X), (outputs(a, X) + outputs(b, X)) / 2)
    settings = pleas.MergeSettings(heads="separate", min_rows=0.0)
    found = merged(ZipIt(beta=0.0), gathered([linear(*A), linear(*SWAPPED)], [X], settings))
    torch.testing.assert_close(outputs(found, X), torch.cat([outputs(linear(*A), X)] * 2, 1))


def test_an_aligning_map_undoes_a_linear_map() -> None:
    """x_2 = Q x_1, so T = Q^-1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    q = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    both = torch.cat([x, x @ q.T], 1)
    covariance = torch.cov(both.T).unflatten(0, (2, 3)).unflatten(2, (2, 3))
    torch.testing.assert_close(aligning_map(covariance, 1, 1e-9), torch.linalg.inv(q), rtol=1e-4, atol=1e-4)


def test_cycles_reach_the_best_of_all_permutations() -> None:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(3):
        first = torch.randn(3, 2, generator=generator)
        made.append(linear(first.tolist(), torch.randn(2, 3, generator=generator).tolist()))
    found = merged(C2M3(), gathered(made, [X]))

    def distance(orders: tuple[tuple[int, ...], ...]) -> float:
        units = [
            torch.cat([m.get_parameter("0.weight"), m.get_parameter("2.weight").T], 1).detach()[list(order)]
            for m, order in zip(made, orders, strict=True)
        ]
        return sum(float((x * y).sum()) for x, y in itertools.combinations(units, 2))

    every = list(itertools.permutations(range(3)))
    best = max(itertools.product([every[0]], every, every), key=distance)
    expected = sum(m.get_parameter("0.weight")[list(o)] for m, o in zip(made, best, strict=True)) / 3
    torch.testing.assert_close(state(found)["0.weight"], expected.detach())  # type: ignore[union-attr]


def test_groups_and_heads_are_not_mixed() -> None:
    evidence = evidence_of("grouped", parents("grouped"))
    why = not_mixable(evidence.parents)
    assert why is not None
    assert why.endswith(
        "hold units of their own (heads, groups of channels), which can be permuted but not mixed"
    )
    assert ZipIt().obstacle(evidence.parents) == C2M3().obstacle(evidence.parents) == why
    with pytest.raises(InputError, match="repair = 'closed': must be one of none, proxies"):
        ZipIt(repair="closed")
