"""Every choice of the refine stage that changes its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from pleas.errors import InputError
from pleas.settings import Targets

STEPS = 1000  # of a run that names neither steps nor minutes


@dataclass(frozen=True)
class RefineSettings:
    """Settings of `refine`; the defaults come from the search described in docs/refine.md.

    steps, minutes: length of the run: at most one of them; STEPS steps when neither is given. With minutes
                  the schedule follows the clock, so two runs differ slightly
    batch:        images per step
    rate:         highest learning rate (Adam): a linear rise over the share `warmup` of the run, then a
                  cosine to zero
    targets:      what is learnt of an image: "mean", the mean of the parents' logits, or every head's alike; "own",
                  mostly those of the parent whose batch norms it fits best; "auto", that only where parents contradict
                  each other, or, with a head each, where the images of one are foreign to another
    temperature:  both sides' logits are divided by it before the softmax
    logit_weight: weight of the mean squared error of the logits, beside the cross-entropy
    joint_weight: weight of the cross-entropy over the labels of both heads together (separate heads only)
    feature_weight: weight of the relative squared error of inner activations on matched units
                  (`refine(features=...)`)
    clip:         largest norm of the gradient over all weights
    average:      decay per step of the moving average of the weights, which is what is judged and kept;
                  0: none
    batch_statistics: batch norms normalise by the batch at hand while training and keep a running mean of its
                  statistics; False: they keep those that the merge gave them
    views:        how many augmented batches there are before they come round again, so that the parents
                  answer each of them once; 0: a new batch every step
    mix:          share of a batch whose images are blended with others, so that the network learns what lies
                  between the images of one parent and of the other
    renewals:     how often, evenly over the run, new images are asked for (`refine(renew=...)`), to be trained on
                  beside those there are
    holdout:      share of the images never trained on, on which the result is judged; up to a quarter where they are so
                  few that this would be under 128, and never fewer than 64
    checks:       how often it is judged, and the state handed to `checkpoint`
    patience:     checks without a better result after which the run ends early; None: it never does
    retries:      how often a diverged run goes back to its last check, at half the rate, before it ends
    half:         bfloat16 arithmetic where the device is a GPU
    """

    steps: int | None = None
    minutes: float | None = None
    batch: int = 64
    rate: float = 1e-3
    warmup: float = 0.05
    targets: Targets = "auto"
    temperature: float = 1.0
    logit_weight: float = 1.0
    joint_weight: float = 0.0
    feature_weight: float = 0.0
    clip: float = 1.0
    average: float = 0.99
    batch_statistics: bool = True
    views: int = 512
    mix: float = 0.0
    renewals: int = 0
    holdout: float = 0.1
    checks: int = 20
    patience: int | None = None
    retries: int = 4
    half: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is not None and self.minutes is not None:
            raise InputError(f"steps = {self.steps} and minutes = {self.minutes:g} are both given: give one")
        if self.steps is not None and self.steps < 1:
            raise InputError(
                f"steps = {self.steps}: at least one step is needed; to refine nothing, leave the stage out"
            )
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(
                f"minutes = {self.minutes:g}: must be above 0; to refine nothing, leave the stage out"
            )
        if self.targets not in get_args(Targets):
            raise InputError(f"targets = {self.targets!r}: must be one of {', '.join(get_args(Targets))}")
        for name, low in (("batch", 1), ("checks", 1), ("retries", 0), ("views", 0), ("renewals", 0)):
            if getattr(self, name) < low:
                raise InputError(f"{name} = {getattr(self, name)}: must be at least {low}")
        if self.patience is not None and self.patience < 1:
            raise InputError(
                f"patience = {self.patience}: must be at least 1 check, or None to never end early"
            )
        for name in ("rate", "temperature", "clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} = {getattr(self, name):g}: must be above 0")
        for name in ("logit_weight", "joint_weight", "feature_weight"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} = {getattr(self, name):g}: must not be negative")
        for name in ("warmup", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name):g}: must be at least 0 and below 1")
        if not 0 <= self.mix <= 1:
            raise InputError(f"mix = {self.mix:g}: must be between 0 and 1, a share of every batch")
        if not 0 < self.holdout <= 0.5:
            raise InputError(
                f"holdout = {self.holdout:g}: must be above 0 and at most 0.5; nothing else says when to stop"
            )

    @property
    def length(self) -> int | None:
        """Steps of the run, None where the clock decides."""
        return None if self.minutes is not None else self.steps or STEPS

    @property
    def limit(self) -> float:
        """Seconds of a run that the clock decides."""
        assert self.minutes is not None
        return 60 * self.minutes
