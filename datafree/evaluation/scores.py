"""What one network scored: values, as they stand in `metrics.json` and in the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from datafree.evaluation.measures import Interval


@dataclass(frozen=True)
class TaskScore:
    """One network on one task. Shares are between 0 and 1.

    interval:    95 % of the accuracy, by bootstrap over the images
    top5:        share of images whose class is among the five largest outputs; None below 20 classes
    nll:         negative log-likelihood, in nats        calibration: expected calibration error
    per_class:   class name -> accuracy         worst_class: (name, accuracy) of the lowest
    agreement:   parent -> share of images for which the network chooses the class that parent chooses
    normalised:  accuracy over that of the task's expert, or of the best parent where it has none; None if not known
    error:       squared error of the outputs relative to the variance of the ensemble's; None if not known
    predictions, targets: int64 (N,), counted inside the head
    """

    task: str
    expert: str | None
    count: int
    accuracy: float
    per_class: Mapping[str, float]
    worst_class: tuple[str, float]
    agreement: Mapping[str, float] = field(default_factory=dict)
    predictions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), repr=False, compare=False)
    targets: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), repr=False, compare=False)
    interval: Interval | None = None
    top5: float | None = None
    nll: float | None = None
    calibration: float | None = None
    normalised: float | None = None
    error: float | None = None

    @classmethod
    def from_dict(
        cls, task: str, value: Mapping[str, Any], predictions: np.ndarray, targets: np.ndarray
    ) -> TaskScore:
        """Inverse of `to_dict`, which leaves the predictions out."""
        plain = {**value, "interval": None if value["interval"] is None else tuple(value["interval"])}
        worst = plain.pop("worst_class")
        return cls(
            task,
            worst_class=(worst["class"], worst["accuracy"]),
            predictions=predictions,
            targets=targets,
            **plain,
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "expert": self.expert,
            "count": self.count,
            "accuracy": self.accuracy,
            "interval": None if self.interval is None else list(self.interval),
            "normalised": self.normalised,
            "top5": self.top5,
            "nll": self.nll,
            "calibration": self.calibration,
            "error": self.error,
            "per_class": dict(self.per_class),
            "worst_class": {"class": self.worst_class[0], "accuracy": self.worst_class[1]},
            "agreement": dict(self.agreement),
        }


@dataclass(frozen=True)
class Evaluation:
    """One network on every task it can answer.

    average: mean of the tasks' accuracies        joint: accuracy among the labels of all heads, images of
    all tasks pooled; None with shared labels and for a network with one head
    interval, joint_interval: 95 % of them, by bootstrap over the images
    """

    tasks: tuple[TaskScore, ...]
    average: float | None
    joint: float | None = None
    interval: Interval | None = None
    joint_interval: Interval | None = None

    @property
    def normalised(self) -> float | None:
        """Mean over tasks of the share of the expert's accuracy; None where one is not known."""
        shares = [score.normalised for score in self.tasks if score.normalised is not None]
        return sum(shares) / len(shares) if shares and len(shares) == len(self.tasks) else None

    def score(self, task: str) -> TaskScore | None:
        """The score on the task called `task`, None where the network has no head for it."""
        return next((score for score in self.tasks if score.task == task), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values, without the predictions."""
        return {
            "tasks": {score.task: score.to_dict() for score in self.tasks},
            "average": self.average,
            "interval": None if self.interval is None else list(self.interval),
            "normalised": self.normalised,
            "joint": self.joint,
            "joint_interval": None if self.joint_interval is None else list(self.joint_interval),
        }
