"""Matching by two similarities and by the mean's answers, layers by least squares, distillation; by hand."""

from __future__ import annotations

import pytest
import torch

import pleas
from pleas.comparators.distilling import Distillation, fresh, pack, unpack
from pleas.comparators.matching import MuDSC, StraightThrough, mean_similarities
from pleas.comparators.solving import NeuronInterpolation, PublishedPLeaS, near_pairs
from tests.merging import difference, evidence_of, images, outputs, parents, permuted_copy
from tests.pleas.comparators.small import gathered, linear, merged, state

X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [1.0, 3.0]])
A = ([[1.0, 0.0], [0.0, 2.0]], [[1.0, 3.0], [5.0, 7.0]])
SWAPPED = ([[0.0, 2.0], [1.0, 0.0]], [[3.0, 1.0], [7.0, 5.0]])


@pytest.mark.parametrize(
    "method", [MuDSC(), MuDSC(alpha=0.0), StraightThrough(steps=2), NeuronInterpolation()]
)
def test_a_permuted_copy_is_the_network_itself(method: MuDSC) -> None:
    found = state(merged(method, gathered([linear(*A), linear(*SWAPPED)], [X] * 4)))
    torch.testing.assert_close(found["0.weight"], torch.tensor(A[0]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found["2.weight"], torch.tensor(A[1]), rtol=1e-3, atol=1e-3)


def test_weights_and_activations_are_means_over_their_places() -> None:
    evidence = gathered([linear(*A), linear(*SWAPPED)], [X])
    symmetry = evidence.parents.symmetry
    c = next(c for c in range(2) if c not in symmetry.output)
    known = {
        ("0.weight", 0): torch.tensor([[1.0]]),
        ("2.weight", 1): torch.tensor([[3.0]]),
        ("other", 0): torch.ones(1, 1),
    }
    found = mean_similarities([(0.5, known), (0.25, {("0.weight", 0): torch.tensor([[8.0]])})], c, symmetry)
    assert {axis: float(x) for axis, x in found.items()} == {("0.weight", 0): 0.25 + 2, ("2.weight", 1): 0.75}


def test_weights_alone_can_decide_what_activations_leave_open() -> None:
    """Both units of each parent read the same: only what reads them tells them apart, 7 from 5 and so on."""
    a, b = (
        linear([[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]),
        linear([[1.0, 0.0], [1.0, 0.0]], [[0.0, 2.0], [2.0, 0.0]]),
    )
    found = state(merged(MuDSC(), gathered([a, b], [X])))
    torch.testing.assert_close(found["2.weight"], torch.tensor([[1.5, 0.0], [0.0, 1.5]]))


def test_distances_match_units_of_one_size() -> None:
    """Units x_0 and 3 x_0 correlate alike with both of b's; by distance each has its own."""
    a, b = linear([[1.0, 0.0], [3.0, 0.0]], [[1.0, 1.0]]), linear([[3.0, 0.0], [1.0, 0.0]], [[1.0, 1.0]])
    evidence = gathered([a, b], [X])
    permutation, _ = near_pairs(evidence.parents, evidence.statistics).assign(0, 1)
    hidden = next(c for c in range(2) if c not in evidence.parents.symmetry.output)
    assert permutation[hidden].perm.tolist() == [1, 0]


def test_one_layer_of_neuron_interpolation_is_the_mean_map() -> None:
    a, b = linear([[1.0, 2.0], [0.0, 4.0]]), linear([[3.0, 0.0], [2.0, 0.0]])
    found = state(merged(NeuronInterpolation(), gathered([a, b], [X] * 4)))
    torch.testing.assert_close(
        found["0.weight"], torch.tensor([[2.0, 1.0], [1.0, 2.0]]), rtol=1e-4, atol=1e-4
    )


def test_published_pleas_comes_to_the_least_squares_of_mean_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 2, generator=generator)
    a, b = linear([[1.0, 0.5], [0.2, 2.0]], [[1.0, 3.0]]), linear([[1.2, 0.1], [0.4, 1.0]], [[2.0, 1.0]])
    evidence = gathered([a, b], [x])
    found = state(merged(PublishedPLeaS(steps=400, batch=64, rate=0.05), evidence))
    hidden = [torch.relu(x @ m.get_parameter("0.weight").T) for m in (a, b)]
    target = sum(h @ m.get_parameter("2.weight").T for h, m in zip(hidden, (a, b), strict=True)) / 2
    expected = torch.linalg.lstsq((hidden[0] + hidden[1]) / 2, target).solution.T
    torch.testing.assert_close(found["2.weight"], expected.detach(), rtol=1e-2, atol=1e-2)


def test_methods_that_fit_leave_a_permuted_copy_as_it_is() -> None:
    name = "plain"
    a = pleas.reestimate_bn(parents(name)[0], [images(name)])
    evidence = evidence_of(name, (a, pleas.reestimate_bn(permuted_copy(name), [images(name)])))
    x = images(name, 8, seed=9)
    for method in (MuDSC(), PublishedPLeaS(steps=2), StraightThrough(steps=2)):
        assert difference(outputs(merged(method, evidence), x), outputs(a, x)) < 0.05, method


def test_images_travel_as_bytes() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert pack(x).shape == (2, 3, 4, 20)
    assert torch.equal(unpack(pack(x)), x)


def test_distillation_starts_from_a_parent_or_from_scratch() -> None:
    name = "plain"
    evidence = evidence_of(name, parents(name), count=160)
    x = images(name, 8, seed=9)
    one = merged(Distillation(start="scratch", steps=3, batch=16), evidence, seed=4)
    again = merged(Distillation(start="scratch", steps=3, batch=16), evidence, seed=4)
    assert torch.equal(outputs(one, x), outputs(again, x))
    assert not torch.equal(
        outputs(one, x),
        outputs(merged(Distillation(start="scratch", steps=3, batch=16), evidence, seed=5), x),
    )
    parent = merged(Distillation(steps=3, batch=16, rate=1e-9), evidence)
    assert difference(outputs(parent, x), outputs(parents(name)[0], x)) < 0.5


def test_a_fresh_network_is_seeded() -> None:
    first, second = (fresh(parents("plain")[0], 3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["1.weight"], parents("plain")[0].state_dict()["1.weight"])


def test_straight_through_compares_two_parents_of_one_label_set() -> None:
    three = gathered([linear(*A), linear(*SWAPPED), linear(*A)], [X])
    assert StraightThrough().obstacle(three.parents) == "it is defined for 2 parents, and there are 3"
    assert Distillation().obstacle(three.parents) == (
        "it is trained on moved and mirrored images (N, C, H, W), and these inputs are none"
    )
