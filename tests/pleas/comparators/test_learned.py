"""What is learnt on the proxies: first steps by hand, and that the loss falls."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import pleas
from pleas import InputError, Parents
from pleas.comparators.comparator import Case
from pleas.comparators.learned import AdaMerging, ConcreteMask, FwMerging, alignment, entropy, masked
from pleas.comparators.vectors import FromBase
from pleas.settings import Heads

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
BASE = [[0.5, 0.0, 0.0], [0.0, 0.5, 0.0]]
A = [[1.5, 0.0, 0.0], [0.0, 0.5, 0.2]]
B = [[0.5, 0.3, 0.0], [0.0, 0.1, 0.0]]


def line(weight: list[list[float]]) -> nn.Module:
    made = nn.Sequential(nn.Linear(3, 2, bias=False))
    made[0].weight.data = torch.tensor(weight)
    return made.eval()


@cache
def case(heads: Heads = "shared") -> Case:
    parents = Parents.of(
        [line(A), line(B)], X[:2], pleas.MergeSettings(min_rows=0.0, heads=heads), base=line(BASE)
    )
    evidence = pleas.gather(parents, [X[:16], X[16:]])
    return Case(evidence, evidence.inputs, base=parents.base_state)


def merged(method: FromBase) -> Tensor:
    given, random = case(), torch.get_rng_state()
    found = method(given)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert isinstance(found, nn.Module)
    return found.state_dict()["0.weight"].double()


def uncertainty(weight: Tensor) -> float:
    return float(entropy(X.double() @ weight.T))


BASE_W, A_W, B_W = (torch.tensor(x).double() for x in (BASE, A, B))
TASK_ARITHMETIC = BASE_W + 0.3 * (A_W + B_W - 2 * BASE_W)


def test_entropy_of_predictions() -> None:
    assert float(entropy(torch.zeros(3, 4))) == pytest.approx(math.log(4))
    p = 1 / (1 + math.exp(-1))
    expected = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    assert float(entropy(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))) == pytest.approx(expected)


def test_without_a_step_they_are_task_arithmetic() -> None:
    for method in (AdaMerging(steps=0), ConcreteMask(steps=0), FwMerging(rounds=0)):
        torch.testing.assert_close(merged(method), TASK_ARITHMETIC, rtol=1e-6, atol=1e-6)


def test_the_first_step_of_adamerging_is_the_rate_along_the_sign_of_the_gradient() -> None:
    factors = torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True)
    weight = BASE_W + factors[0] * (A_W - BASE_W) + factors[1] * (B_W - BASE_W)
    entropy(X[:16].double() @ weight.T).backward()
    assert factors.grad is not None
    after = 0.3 - 0.1 * factors.grad.sign()
    expected = BASE_W + after[0] * (A_W - BASE_W) + after[1] * (B_W - BASE_W)
    torch.testing.assert_close(merged(AdaMerging(steps=1, rate=0.1)), expected, rtol=1e-5, atol=1e-5)


def test_learning_lowers_the_entropy() -> None:
    start = uncertainty(TASK_ARITHMETIC)
    assert uncertainty(merged(AdaMerging(steps=30, rate=0.05))) < start - 0.05
    assert uncertainty(merged(ConcreteMask(steps=30, rate=0.1))) < start


def test_a_mask_is_divided_by_its_mean_over_all_tensors() -> None:
    vector = {"a": torch.tensor([4.0, 4.0]), "b": torch.tensor([4.0])}
    found = masked(vector, {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.5])})
    assert found["a"].tolist() == [8.0, 0.0]
    assert found["b"].tolist() == [4.0]


def test_alignment_is_the_sum_of_cosines() -> None:
    gradient = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([2.0])}
    base = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([1.0])}
    vector = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([-3.0])}
    assert alignment(gradient, base, vector) == pytest.approx(1 / math.sqrt(2) - 1)
    assert alignment({"a": torch.zeros(2)}, base, vector) == 0


def test_a_step_of_frank_wolfe_goes_to_the_parent_against_the_gradient() -> None:
    start = TASK_ARITHMETIC.clone().requires_grad_()
    seen = X[:8].double()
    losses = [nn.functional.cross_entropy(seen @ start.T, (seen @ own.T).argmax(1)) for own in (A_W, B_W)]
    (sum(losses) / 2).backward()  # type: ignore[operator]
    assert start.grad is not None
    cosines = [
        float((start.grad * w).sum() / (start.grad.norm() * w.norm())) for w in (A_W, B_W, TASK_ARITHMETIC)
    ]
    towards = (A_W, B_W, TASK_ARITHMETIC)[cosines.index(min(cosines))]
    expected = TASK_ARITHMETIC + 2 / 2 * 0.5 * 0.3 * (towards - TASK_ARITHMETIC)
    found = merged(FwMerging(step=0.5, rounds=1, images=8))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def deep(weight: list[list[float]], head: list[list[float]]) -> nn.Module:
    made = nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU(), nn.Linear(2, len(head), bias=False))
    made[0].weight.data, made[2].weight.data = torch.tensor(weight), torch.tensor(head)
    return made.eval()


def test_separate_heads_stay_as_they_are_and_each_learns_by_its_own() -> None:
    """The entropies of both heads are added; neither head has a task vector, nor has the base their outputs."""
    heads = [[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    base = deep(BASE, [[1.0, 1.0]] * 7)
    settings = pleas.MergeSettings(min_rows=0.0, heads="separate")
    parents = Parents.of([deep(A, heads[0]), deep(B, heads[1])], X[:2], settings, base=base)
    evidence = pleas.gather(parents, [X])
    found = AdaMerging(steps=1, rate=0.1)(Case(evidence, evidence.inputs, parents.base_state))
    assert isinstance(found, nn.Module)
    factors = torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True)
    weight = BASE_W + factors[0] * (A_W - BASE_W) + factors[1] * (B_W - BASE_W)
    units = (X[:16].double() @ weight.T).relu()
    sum(entropy(units @ torch.tensor(head).double().T) for head in heads).backward()  # type: ignore[union-attr]
    assert factors.grad is not None
    after = 0.3 - 0.1 * factors.grad.sign()
    state = dict(found.named_parameters()) | dict(found.named_buffers())
    expected = BASE_W + after[0] * (A_W - BASE_W) + after[1] * (B_W - BASE_W)
    torch.testing.assert_close(state["0.weight"].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found(X), torch.cat([(X @ expected.float().T).relu() @ torch.tensor(head).T for head in heads], 1)
    )


def test_a_network_that_is_all_head_has_no_task_vector() -> None:
    with pytest.raises(InputError, match="the base shares no tensor with the parents"):
        AdaMerging(steps=1)(case("separate"))
