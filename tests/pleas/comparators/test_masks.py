"""Masks and ranks of task vectors, by hand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pleas.comparators.masks import consensus, pcb, widen


def vector(*values: float) -> dict[str, Tensor]:
    return {"w": torch.tensor(values, dtype=torch.float64)}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_pcb_weighs_by_size_and_agreement() -> None:
    """Clipped to the second largest, both vectors are 0, 1, 1 in size, so that exp(2 norm^2) is 1, e^2, e^2; the sum is
    0, 3, 1, so that tanh(v * sum) is 0, tanh 3, tanh 2 and 0, tanh 6, -tanh 1. The lowest half is dropped."""
    given = [vector(0, 1, 2), vector(0, 2, -1)]
    torch.testing.assert_close(pcb(given, 0.5, 1.0)["w"].tolist(), [0.0, 1.0, 0.0])
    torch.testing.assert_close(pcb(given, 1.0, 2.0)["w"].tolist(), [0.0, 2.0, 2.0])


def test_pcb_of_one_vector_twice_is_that_vector_where_it_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1000, generator=generator, dtype=torch.float64)
    found = pcb([{"w": value}, {"w": value}], 0.1, 1.0)["w"]
    kept = found != 0
    assert 50 < int(kept.sum()) <= 101
    assert bool((value.abs()[kept].min() >= value.abs()[~kept]).all())
    inner = kept & (value.abs() < value.abs().max())
    torch.testing.assert_close(found[inner], value[inner])


def test_consensus_keeps_what_serves_several() -> None:
    """The sum is 2, 0.5, 2. It serves the first where |1, 1, 0| > 0.4 |1, -0.5, 2|, the second where
    |1, -0.5, 2| > 0.4 |1, 1, 0|: both in the first two places."""
    given = [vector(1, 1, 0), vector(1, -0.5, 2)]
    torch.testing.assert_close(consensus(given, 0.4, 2, 0.3)["w"].tolist(), [0.6, 0.15, 0.0])
    torch.testing.assert_close(consensus(given, 0.4, 1, 1.0)["w"].tolist(), [2.0, 0.5, 2.0])


def test_widen_of_vectors_weighs_entries_by_their_change() -> None:
    """Above their parent's mean are 3 of (1, 3) and 2 of (2, 1): they count in full, the others by softmax."""
    given = torch.tensor([[1.0, 3.0], [2.0, 1.0]], dtype=torch.float64)
    found = widen(torch.zeros(2, dtype=torch.float64), given, 1.0, 1.0)
    torch.testing.assert_close(found.tolist(), [sigmoid(-1) + 2, 3 + sigmoid(-2)])


def test_widen_of_matrices_ranks_inputs_by_stretch_and_turn() -> None:
    """The first parent stretches input 0, the second turns and stretches input 1. Ranks in stretch are (1/2, 0) and
    (0, 1/2), in turn (0, 1/2) twice; what is above 1/4 counts in full. So input 0 has weights (1 + 1/2) / 2 and
    (sigmoid(-1/2) + 1/2) / 2, input 1 (sigmoid(-1/2) + 1) / 2 and 1."""
    base = torch.eye(2, dtype=torch.float64)
    first, second = torch.zeros(2, 2).double(), torch.zeros(2, 2).double()
    first[0, 0], first[1, 1], second[0, 1] = 1.0, 0.0, 1.0
    found = widen(base, torch.stack([first, second]), 1.0, 1.0)
    torch.testing.assert_close(found.tolist(), [[0.75, 1.0], [0.0, 0.0]])
    unfolded = widen(
        base.view(2, 1, 1, 2), torch.stack([first, second]).view(2, 2, 1, 1, 2), 1.0, 1.0
    )  # as a convolution
    torch.testing.assert_close(unfolded.flatten(1), found)
