"""Agreement and divergence on held-out proxies against sums done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from datafree.evaluation.evaluate import merged_columns, parent_columns
from datafree.evaluation.fidelity import Fidelity, fidelity

SIZES = {"a": 2, "b": 2}
A = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
B = torch.tensor([[0.0, 2.0], [0.0, 1.0], [1.0, 0.0]])


def by_hand(theirs: Tensor, ours: Tensor) -> float:
    total = 0.0
    for p_row, q_row in zip(theirs.tolist(), ours.tolist(), strict=True):
        p, q = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (p_row, q_row))
        total += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    return total / len(theirs)


def test_a_shared_head_is_compared_with_every_parent() -> None:
    mean = (A + B) / 2 + torch.tensor([[0.1, 0.0]] * 3)
    found = fidelity(mean, {"a": A, "b": B}, merged_columns("shared", SIZES), (A + B) / 2)
    assert found.images == 3
    assert found.agreement == pytest.approx({"a": 1.0, "b": 2 / 3})
    assert found.divergence == pytest.approx({"a": by_hand(A, mean), "b": by_hand(B, mean)})
    target = (A + B) / 2
    assert found.error == pytest.approx(3 * 0.1**2 / float((target - target.mean(0)).square().sum()))
    assert found.mean_agreement == pytest.approx(5 / 6)


def test_an_image_may_belong_to_one_parent() -> None:
    found = fidelity(
        A, {"a": A, "b": B}, merged_columns("shared", SIZES), (A + B) / 2, torch.tensor([1, 1, 0])
    )
    assert found.own == pytest.approx(2 / 3), "it says what a says, and the first image is b's"
    alone = parent_columns("separate", "a", SIZES)
    assert fidelity(A, {"a": A, "b": B}, alone, A, torch.tensor([1, 1, 0])).own is None


def test_separate_heads_are_compared_with_their_own_parent() -> None:
    outputs = torch.cat([A, A], 1)
    found = fidelity(outputs, {"a": A, "b": B}, merged_columns("separate", SIZES), torch.cat([A, B], 1))
    assert found.agreement == pytest.approx({"a": 1.0, "b": 2 / 3})
    assert found.divergence == pytest.approx({"a": 0.0, "b": by_hand(B, A)})


def test_a_parent_with_its_own_head_alone_knows_nothing_of_the_other() -> None:
    found = fidelity(A, {"a": A, "b": B}, parent_columns("separate", "a", SIZES), torch.cat([A, B], 1))
    assert found == Fidelity(3, {"a": 1.0}, {"a": 0.0}, None)
