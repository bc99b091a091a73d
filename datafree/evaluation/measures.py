"""What is measured of predictions, each in a few lines: no metric library is light enough to earn its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from datafree.seeds import derive_seed

Interval = tuple[float, float]

MANY = 20  # classes, from which on the first five choices are looked at too
BINS = 15  # of confidence, as Guo et al. have it
RESAMPLES = 2000


def top_k(logits: Tensor, targets: Tensor, k: int) -> float:
    """Share of rows of (N, K) whose target is among the k largest logits."""
    return float((logits.topk(k, 1).indices == targets[:, None]).any(1).double().mean())


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """Mean over rows, in nats."""
    return float(F.cross_entropy(logits.double(), targets))


def calibration_error(logits: Tensor, targets: Tensor) -> float:
    """Expected calibration error: |accuracy - confidence| in bins of confidence, weighted by their rows.

    Guo et al., arXiv 1706.04599, eq. 5
    """
    confidence, chosen = logits.double().softmax(1).max(1)
    right = (chosen == targets).double()
    places = (confidence * BINS).long().clamp_max(BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, places, right - confidence)
    return float(gaps.abs().sum() / len(targets))


def bootstrap(accuracies: Mapping[str, tuple[float, int]]) -> Interval:
    """95 % interval of the mean of accuracies over test images that might have been others.

    accuracies: task -> accuracy and number of images. Drawing n images anew, each right or wrong, is a binomial draw.
    """
    total = np.zeros(RESAMPLES)
    for task, (accuracy, count) in accuracies.items():
        generator = np.random.default_rng(derive_seed(0, "bootstrap", task))
        total += generator.binomial(count, accuracy, RESAMPLES) / count
    low, high = np.quantile(total / len(accuracies), [0.025, 0.975])
    return float(low), float(high)


def confusion(targets: np.ndarray, chosen: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """int64 (K, K + 1): images of each of the K `classes` by the class chosen; the last column is any other."""
    place = {target: number for number, target in enumerate(classes)}
    table = np.zeros((len(classes), len(classes) + 1), np.int64)
    for target, choice in zip(targets.tolist(), chosen.tolist(), strict=True):
        table[place[target], place.get(choice, len(classes))] += 1
    return table


def relative_error(outputs: Tensor, target: Tensor) -> float:
    """Squared error over the target's variance, (N, K) each; 1 is what the target's mean would do."""
    wanted = target.double()
    spread = (wanted - wanted.mean(0)).square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float((outputs.double() - wanted).square().sum() / spread)
