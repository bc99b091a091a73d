"""Task vectors as matrices: by hand, and against slow and obvious twins."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from pleas.comparators.subspace import Doge, doge, is_matrix, iso_c, nearest_orthogonal, tsv, wudi


def matrix(*rows: list[float]) -> dict[str, Tensor]:
    return {"w": torch.tensor(rows, dtype=torch.float64)}


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: Mapping[str, Tensor], *rows: list[float]) -> None:
    torch.testing.assert_close(found["w"].flatten(1), torch.tensor(rows, dtype=torch.float64))


def test_iso_c_makes_the_spectrum_of_the_sum_flat() -> None:
    close(iso_c([matrix([3, 0], [0, 0]), matrix([0, 0], [0, 1])]), [2, 0], [0, 2])
    found = iso_c([{"w": random((4, 2, 1, 3), 0)}, {"w": random((4, 2, 1, 3), 1)}])["w"]  # a convolution
    spectrum = torch.linalg.svdvals(found.flatten(1))
    torch.testing.assert_close(spectrum, spectrum.mean().expand(4))


def test_what_is_no_matrix_is_averaged() -> None:
    bias = [{"w": torch.tensor([1.0, 3.0])}, {"w": torch.tensor([3.0, 5.0])}]
    column = [{"w": torch.tensor([[1.0], [3.0]])}, {"w": torch.tensor([[3.0], [5.0]])}]
    for method in (iso_c, tsv, lambda vectors: wudi(vectors, 3, 0.1)):
        assert method(bias)["w"].tolist() == [2.0, 4.0]
        assert method(column)["w"].tolist() == [[2.0], [4.0]]
    assert not is_matrix(torch.zeros(1, 4, 4))
    assert is_matrix(torch.zeros(2, 1, 3))


def test_a_layer_that_nobody_changed_stays() -> None:
    still = [matrix([0, 0], [0, 0])] * 2
    for method in (iso_c, tsv, lambda vectors: wudi(vectors, 3, 0.1)):
        close(method(still), [0, 0], [0, 0])


def test_tsv_puts_the_first_singular_vectors_side_by_side() -> None:
    close(tsv([matrix([3, 0], [0, 1]), matrix([1, 0], [0, 5])]), [3, 0], [0, 5])


def test_tsv_makes_overlapping_directions_orthogonal() -> None:
    """Against numpy's singular vectors and scipy's polar decomposition."""
    values = [random((5, 4), seed) for seed in (0, 1)]
    parts = [np.linalg.svd(value.numpy(), full_matrices=False) for value in values]
    left = scipy.linalg.polar(np.concatenate([u[:, :2] for u, _, _ in parts], 1))[0]
    right = scipy.linalg.polar(np.concatenate([vh[:2] for _, _, vh in parts]))[0]
    middle = np.diag(np.concatenate([s[:2] for _, s, _ in parts]))
    expected = torch.from_numpy(left @ middle @ right)
    torch.testing.assert_close(tsv([{"w": value} for value in values])["w"], expected)


def test_the_nearest_orthogonal_matrix_is_scipys() -> None:
    given = random((5, 3), 2)
    torch.testing.assert_close(
        nearest_orthogonal(given), torch.from_numpy(scipy.linalg.polar(given.numpy())[0])
    )


def test_fewer_directions_than_tasks_are_averaged() -> None:
    three = [matrix([float(i), 0], [0, 1]) for i in (1, 2, 3)]
    close(tsv(three), [2, 0], [0, 1])


def test_one_step_of_wudi_by_hand() -> None:
    """From the sum [[2, 0], [0, 1]] the gradient is 2 ([[1, 0], [0, 0]] + [[1, 0], [0, 0]] / 2): Adam's first step is
    the rate along its sign."""
    given = [matrix([1, 0], [0, 0]), matrix([1, 0], [0, 1])]
    close(wudi(given, 0, 0.1), [2, 0], [0, 1])
    close(wudi(given, 1, 0.1), [1.9, 0], [0, 1])


def test_wudi_follows_the_published_loss() -> None:
    values = random((3, 4, 5), 0)
    merged = values.sum(0).requires_grad_()
    optimiser = torch.optim.Adam([merged], lr=0.01)
    for _ in range(5):
        loss = sum((((merged - v) @ v.T) ** 2).sum() / (v**2).sum() for v in values)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimiser.step()
    torch.testing.assert_close(wudi([{"w": v} for v in values], 5, 0.01)["w"], merged.detach())


def test_doge_without_a_step_is_the_sum_of_task_vectors_of_one_size() -> None:
    values = torch.stack([matrix([3, 0], [0, 4])["w"], matrix([0, 1], [0, 0])["w"]])
    everything = torch.ones_like(values, dtype=torch.bool)
    found = doge(values, everything, Doge(size=0.5, steps=0))
    torch.testing.assert_close(found.tolist(), [[0.3, 0.5], [0.0, 0.4]])
    everything[0, 0, 0] = False
    torch.testing.assert_close(doge(values, everything, Doge(size=0.5, steps=0))[0, 0].item(), 0.0)


def test_doge_follows_the_published_loss_off_the_shared_directions() -> None:
    values, settings = random((2, 4, 6), 0), Doge(size=0.7, subspace=2, steps=5, rate=0.01)
    mask = torch.ones_like(values, dtype=torch.bool)
    scales = [0.7 / float(v.norm()) for v in values]
    firsts = torch.cat([torch.linalg.svd(v).U[:, :2] for v in values], 1)
    shared = torch.linalg.svd(firsts).U[:, :2]
    moved = torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([moved], lr=0.01)
    for _ in range(5):
        together = sum(c * (v + moved) for c, v in zip(scales, values, strict=True))
        loss = sum(((v * (v - together)).sum(1) ** 2).sum() for v in values)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        assert moved.grad is not None
        moved.grad -= shared @ shared.T @ moved.grad
        optimiser.step()
    expected = sum(c * (v + moved.detach()) for c, v in zip(scales, values, strict=True))
    torch.testing.assert_close(doge(values, mask, settings), expected)


def test_doge_leaves_a_layer_that_nobody_changed() -> None:
    values = torch.zeros(2, 3, 3, dtype=torch.float64)
    found = doge(values, torch.ones_like(values, dtype=torch.bool), Doge(steps=2))
    assert bool((found == 0).all())
