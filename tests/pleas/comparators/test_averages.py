"""Averages of weights and their batch norms, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pleas
from pleas import InputError
from pleas.comparators.averages import ActivationMatching, Permutation, PlainAverage, WeightMatching
from tests.merging import difference, evidence_of, images, outputs, parents, permuted_copy
from tests.pleas.comparators.small import SETTINGS, gathered, linear, merged, normed, state

X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [1.0, 3.0]])
A = ([[1.0, 0.0], [0.0, 2.0]], [[1.0, 3.0], [5.0, 7.0]])
SWAPPED = (
    [[0.0, 2.0], [1.0, 0.0]],
    [[3.0, 1.0], [7.0, 5.0]],
)  # the same function, its hidden units exchanged


def test_a_plain_average_takes_units_as_they_come() -> None:
    found = state(merged(PlainAverage(), gathered([linear(*A), linear(*SWAPPED)], [X])))
    assert found["0.weight"].tolist() == [[0.5, 1.0], [0.5, 1.0]]
    assert found["2.weight"].tolist() == [[2.0, 2.0], [6.0, 6.0]]


@pytest.mark.parametrize("method", [Permutation(), WeightMatching(), ActivationMatching()])
def test_matched_units_of_a_permuted_copy_are_the_network_itself(method: Permutation) -> None:
    found = state(merged(method, gathered([linear(*A), linear(*SWAPPED)], [X])))
    assert found["0.weight"].tolist() == A[0]
    assert found["2.weight"].tolist() == A[1]


def test_three_parents_are_averaged_in_one_order() -> None:
    third = ([[0.0, 5.0], [4.0, 0.0]], [[3.0, 1.0], [7.0, 5.0]])
    evidence = gathered([linear(*A), linear(*SWAPPED), linear(*third)], [X])
    for method in (WeightMatching(), ActivationMatching()):
        found = state(merged(method, evidence))
        torch.testing.assert_close(found["0.weight"], torch.tensor([[2.0, 0.0], [0.0, 3.0]]))


def test_batch_norms_get_the_statistics_of_the_proxies_or_stay_averaged() -> None:
    """One unit: weights (1, 0) and (0, 1), so the mean of the units is (x_0 + x_1) / 2 = 0.5, 0.5, 1.5, 2."""
    evidence = gathered([normed([[1.0, 0.0]], [1.0], [3.0]), normed([[0.0, 1.0]], [3.0], [5.0])], [X])
    kept = state(merged(PlainAverage(repair="none"), evidence))
    assert (kept["1.running_mean"].item(), kept["1.running_var"].item()) == (4.0, 1.0)
    proxies = state(merged(PlainAverage(repair="proxies"), evidence))
    assert proxies["1.running_mean"].item() == pytest.approx(1.125)
    assert proxies["1.running_var"].item() == pytest.approx(1.6875 / 3, rel=1e-5)  # unbiased, as torch has it
    closed = state(merged(PlainAverage(repair="closed"), evidence))
    assert closed["1.running_mean"].item() == pytest.approx(1.125)
    assert closed["1.running_var"].item() == pytest.approx(1.6875 / 4, rel=1e-4)
    assert closed["1.weight"].item() == 2.0


def test_the_closed_form_follows_the_matching() -> None:
    a, b = (
        normed([[1.0, 0.0], [0.0, 2.0]], [1.0, 1.0], [1.0, 2.0]),
        normed([[0.0, 2.0], [1.0, 0.0]], [1.0, 1.0], [2.0, 1.0]),
    )
    found = state(merged(Permutation(repair="closed"), gathered([a, b], [X])))
    torch.testing.assert_close(found["1.running_mean"], torch.tensor([1.0, 2.5]))
    torch.testing.assert_close(found["1.running_var"], torch.tensor([0.5, 4.75]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["pre_activation", "option_a"])
def test_a_permuted_copy_keeps_the_function_of_real_architectures(name: str) -> None:
    """With the very statistics that the proxies have, re-estimating changes nothing; the closed form agrees with it."""
    a = pleas.reestimate_bn(parents(name)[0], [images(name)])
    evidence = evidence_of(name, (a, pleas.reestimate_bn(permuted_copy(name), [images(name)])))
    x = images(name, 8, seed=9)
    for repair in ("none", "closed", "proxies"):
        found = merged(Permutation(repair=repair), evidence)
        assert difference(outputs(found, x), outputs(a, x)) < 0.1, repair


def test_separate_heads_stand_side_by_side() -> None:
    other = ([[0.0, 2.0], [1.0, 0.0]], [[3.0, 1.0], [7.0, 5.0], [1.0, 1.0]])
    settings = pleas.MergeSettings(heads="separate", min_rows=0.0)
    evidence = gathered([linear(*A), linear(*other)], [X], settings)
    answers = outputs(merged(Permutation(), evidence), X)
    expected = torch.cat([outputs(linear(*A), X), outputs(linear(*other), X)], 1)
    torch.testing.assert_close(answers, expected)


def test_a_repair_that_is_none() -> None:
    with pytest.raises(InputError, match="repair = 'some': must be one of none, proxies, closed, rescale"):
        PlainAverage(repair="some")  # type: ignore[arg-type]


def test_what_changed_and_what_stands_in_the_way() -> None:
    assert PlainAverage().changed() == ""
    assert PlainAverage(repair="closed").changed() == "repair closed"
    assert PlainAverage.legend().endswith("uniform soup).")
    modules: list[nn.Module] = [linear(*A), linear(*SWAPPED)]
    assert PlainAverage().obstacle(pleas.Parents.of(modules, X, SETTINGS)) is None


def test_units_without_a_batch_norm_get_the_mean_spread_of_the_parents() -> None:
    """Units x_0 + 1 and x_1 + 3: the mean of their weights gives a unit with less spread than they have."""
    a = linear([[1.0, 0.0]], [[1.0]], biases=[[1.0], [0.0]])
    b = linear([[0.0, 1.0]], [[1.0]], biases=[[3.0], [0.0]])
    network = merged(PlainAverage(repair="rescale"), gathered([a, b], [X[:2], X[2:]]))
    units = X @ state(network)["0.weight"].T + state(network)["0.bias"]
    expected_mean = ((X[:, 0] + 1).mean() + (X[:, 1] + 3).mean()) / 2
    expected_std = (X[:, 0].std(correction=0) + X[:, 1].std(correction=0)) / 2
    torch.testing.assert_close(units.mean(), expected_mean)
    torch.testing.assert_close(units.std(correction=0), expected_std)
    torch.testing.assert_close(state(network)["2.weight"], torch.ones(1, 1))  # the outputs are left alone
