"""How close a network is to its parents on images that nobody labelled: what can be known without any data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from datafree.evaluation.evaluate import Columns
from datafree.evaluation.measures import relative_error


@dataclass(frozen=True)
class Fidelity:
    """One network beside its parents on held-out proxies; a parent whose head the network lacks is left out.

    images:     how many
    agreement:  parent -> share of images for which the network chooses the class that this parent chooses
    divergence: parent -> mean Kullback-Leibler divergence of the network's prediction from this parent's, in nats
    own:        share of images for which it chooses what the parent chooses whose image it is; None where that is not
                known or the network lacks a head
    error:      squared error of the outputs relative to the variance of what they should be, the mean of the parents'
                logits or with separate heads all of them; None for a network that lacks a head
    """

    images: int
    agreement: Mapping[str, float]
    divergence: Mapping[str, float]
    error: float | None = None
    own: float | None = None

    @property
    def mean_agreement(self) -> float:
        return sum(self.agreement.values()) / len(self.agreement)

    @property
    def mean_divergence(self) -> float:
        return sum(self.divergence.values()) / len(self.divergence)

    def to_dict(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "agreement": dict(self.agreement),
            "divergence": dict(self.divergence),
            "own": self.own,
            "error": self.error,
        }


def fidelity(
    outputs: Tensor,
    answers: Mapping[str, Tensor],
    columns: Columns,
    target: Tensor,
    owners: Tensor | None = None,
) -> Fidelity:
    """Compare (N, K) `outputs` with every parent's own, (N, K_p) by name.

    columns: the output columns that stand for each parent        target: (N, K) of all parents together
    owners:  (N,) number of the parent whose image each is, where that is known
    """
    agreement, divergence, same = {}, {}, []
    for name, answer in answers.items():
        head = columns.get(name)
        if head is None:
            continue
        ours, theirs = outputs[:, head].double(), answer.double()
        same.append(ours.argmax(1) == theirs.argmax(1))
        agreement[name] = float(same[-1].double().mean())
        terms = F.kl_div(ours.log_softmax(1), theirs.log_softmax(1), reduction="none", log_target=True)
        divergence[name] = max(0.0, float(terms.sum(1).mean()))
    error = relative_error(outputs, target) if outputs.shape == target.shape else None
    own = None
    if owners is not None and len(same) == len(answers):
        own = float(torch.stack(same, 1).gather(1, owners[:, None]).double().mean())
    return Fidelity(len(outputs), agreement, divergence, error, own)
