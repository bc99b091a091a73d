"""RegMean, RegMean++ and Fisher, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pleas
from pleas import InputError
from pleas.comparators.fisher import Fisher
from pleas.comparators.regmean import RegMean, RegMeanPlusPlus
from pleas.comparators.rows import surest_parent
from tests.merging import difference, evidence_of, images, outputs, parents, permuted_copy
from tests.pleas.comparators.small import gathered, linear, merged, normed, state

X = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])  # X^T X = [[2, 1], [1, 5]]
EYE = [[1.0, 0.0], [0.0, 1.0]]


def test_regmean_weighs_parents_by_their_inputs() -> None:
    """The first layers give the second ones inputs of their own: X and X D, D = diag(1, 3)."""
    a, b = linear(EYE, [[1.0, 2.0], [0.0, 1.0]]), linear([[1.0, 0.0], [0.0, 3.0]], [[3.0, 0.0], [1.0, 1.0]])
    evidence = gathered([a, b], [X[:2], X[2:]])
    for alpha in (0.0, 0.5, 1.0):
        grams = []
        for d in (torch.tensor([1.0, 1.0]), torch.tensor([1.0, 3.0])):
            gram = (X * d).T @ (X * d)
            grams.append(alpha * gram + (1 - alpha) * gram.diag().diag())
        expected = (weight_of(a, "2") @ grams[0] + weight_of(b, "2") @ grams[1]) @ (
            grams[0] + grams[1]
        ).inverse()
        found = state(merged(RegMean(off_diagonal=alpha, permute=False), evidence))
        torch.testing.assert_close(found["2.weight"], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            found["0.weight"], (weight_of(a) + weight_of(b)) / 2
        )  # of one input: the mean


def test_inputs_that_nobody_has_keep_the_mean() -> None:
    dead = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    evidence = gathered([linear([[1.0, 2.0]]), linear([[3.0, 6.0]])], [dead])
    torch.testing.assert_close(state(merged(RegMean(), evidence))["0.weight"], torch.tensor([[2.0, 4.0]]))


@pytest.mark.parametrize("name", ["grouped", "depthwise"])
@pytest.mark.parametrize("method", [RegMean(), RegMeanPlusPlus(repair="none"), Fisher(images=4)])
def test_a_permuted_copy_keeps_its_function(name: str, method: RegMean) -> None:
    a = pleas.reestimate_bn(parents(name)[0], [images(name)])
    evidence = evidence_of(name, (a, pleas.reestimate_bn(permuted_copy(name), [images(name)])))
    x = images(name, 8, seed=9)
    assert difference(outputs(merged(method, evidence), x), outputs(a, x)) < 0.05


def test_proxies_go_to_the_parent_that_is_surest() -> None:
    """Logits (t, 0): a is sure where x_0 is large, b where x_1 is."""
    a, b = linear([[2.0, 0.0], [0.0, 0.0]]), linear([[0.0, 1.0], [0.0, 0.0]])
    x = torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, 0.0], [0.0, 2.0]])
    assert surest_parent(gathered([a, b], [x[:3], x[3:]])).tolist() == [0, 1, 0, 1]


def test_regmean_plus_plus_solves_on_what_the_merged_network_gives() -> None:
    """Layer by layer with loops: the proxies of each parent through the layers merged so far."""
    a = linear([[1.0, 0.0], [1.0, 1.0]], [[1.0, 2.0], [0.0, 1.0]])
    b = linear([[0.0, 1.0], [1.0, 2.0]], [[3.0, 0.0], [1.0, 1.0]])
    x = torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.0, 2.0], [3.0, 1.0], [1.0, 2.0]])
    evidence = gathered([a, b], [x[:3], x[3:]])
    surest = surest_parent(evidence)
    assert set(surest.tolist()) == {0, 1}
    z = x
    expected = []
    for layer in ("0", "2"):
        grams = []
        for p in range(2):
            gram = z[surest == p].T @ z[surest == p]
            grams.append(0.9 * gram + 0.1 * gram.diag().diag())
        weight = (weight_of(a, layer) @ grams[0] + weight_of(b, layer) @ grams[1]) @ (
            grams[0] + grams[1]
        ).inverse()
        expected.append(weight)
        z = (z @ weight.T).relu()
    found = state(merged(RegMeanPlusPlus(permute=False), evidence))
    torch.testing.assert_close(found["0.weight"], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["2.weight"], expected[1], rtol=1e-4, atol=1e-4)


def test_regmean_plus_plus_re_estimates_on_the_way() -> None:
    a, b = normed([[1.0, 0.0]], [1.0], [0.0]), normed([[0.0, 1.0]], [1.0], [0.0])
    network = merged(RegMeanPlusPlus(permute=False), gathered([a, b], [X]))
    units = X @ state(network)["0.weight"].T
    torch.testing.assert_close(state(network)["1.running_mean"], units.mean(0))
    torch.testing.assert_close(state(network)["1.running_var"], units.var(0))


def weight_of(module: nn.Module, name: str = "0") -> torch.Tensor:
    return module.get_parameter(f"{name}.weight").detach()


def fisher_by_hand(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Of one linear map W: E_x sum_y p_y (d log p_y / dW)^2 with d log p_y / dW = (1_y - p) x^T."""
    total = torch.zeros_like(weight_of(module))
    for row in x:
        p = (weight_of(module) @ row).softmax(0)
        for y in range(len(p)):
            total += p[y] * torch.outer(torch.eye(len(p))[y] - p, row).square()
    return total / len(x)


def test_fisher_weighs_parents_by_their_information() -> None:
    a, b = linear([[1.0, 0.0], [0.0, 1.0]]), linear([[3.0, 1.0], [0.0, 2.0]])
    fishers = [fisher_by_hand(m, X) + 1e-6 for m in (a, b)]
    expected = (fishers[0] * weight_of(a) + fishers[1] * weight_of(b)) / (fishers[0] + fishers[1])
    found = state(merged(Fisher(permute=False), gathered([a, b], [X[:2], X[2:]])))
    torch.testing.assert_close(found["0.weight"], expected)


def test_values_out_of_range() -> None:
    with pytest.raises(InputError, match=r"off_diagonal = 1\.5: must lie between 0 and 1"):
        RegMean(off_diagonal=1.5)
    with pytest.raises(InputError, match="images = 0: must lie between 1 and"):
        Fisher(images=0)
