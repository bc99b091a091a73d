"""Measures against scikit-learn's, and against sums done by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datafree.evaluation.measures import (
    bootstrap,
    calibration_error,
    confusion,
    negative_log_likelihood,
    top_k,
)

LOGITS = torch.randn(200, 24, generator=torch.Generator().manual_seed(0)) * 3
TARGETS = torch.randint(24, (200,), generator=torch.Generator().manual_seed(1))


def test_likelihood_and_first_five_are_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    labels, scores = list(range(24)), LOGITS.double()
    expected = metrics.log_loss(TARGETS, scores.softmax(1), labels=labels)
    assert negative_log_likelihood(LOGITS, TARGETS) == pytest.approx(expected)
    assert top_k(LOGITS, TARGETS, 5) == pytest.approx(
        metrics.top_k_accuracy_score(TARGETS, scores, k=5, labels=labels)
    )


def test_calibration_is_the_gap_in_every_bin() -> None:
    confidence, chosen = LOGITS.double().softmax(1).max(1)
    total = 0.0
    for low in range(15):
        here = [
            i for i, c in enumerate(confidence.tolist()) if low <= 15 * c < low + 1 or (low == 14 and c == 1)
        ]
        right = sum(int(chosen[i]) == int(TARGETS[i]) for i in here)
        total += abs(right - sum(float(confidence[i]) for i in here))
    assert calibration_error(LOGITS, TARGETS) == pytest.approx(total / 200)


def test_an_interval_is_what_resampled_images_give() -> None:
    right = np.arange(400) < 320
    generator = np.random.default_rng(0)
    means = [right[generator.integers(400, size=400)].mean() for _ in range(2000)]
    assert bootstrap({"t": (0.8, 400)}) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)
    assert bootstrap({"t": (0.8, 400)}) == bootstrap({"t": (0.8, 400)})
    low, high = bootstrap({"t": (0.8, 400), "u": (0.8, 400)})
    assert high - low == pytest.approx((0.84 - 0.76) / 2**0.5, abs=0.01), "two tasks are surer than one"
    assert bootstrap({"t": (1.0, 10)}) == (1.0, 1.0)


def test_confusion_counts_what_was_chosen() -> None:
    table = confusion(np.array([3, 3, 5, 5]), np.array([3, 5, 5, 0]), [3, 5])
    assert table.tolist() == [[1, 1, 0], [0, 1, 1]]
