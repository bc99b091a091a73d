"""What the merged network learns from its parents, and how close to them it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pleas.errors import NonFinite
from pleas.refine.settings import RefineSettings

Normalise = Callable[[Tensor], Tensor]  # uint8 (N, C, H, W) -> a network's input
Outputs = Literal["logits", "values"]

TINY = 1e-6  # a loss that rounding alone can make


@dataclass(frozen=True)
class Evidence:
    """How close a network is to its parents on the held-out images.

    loss:      what is minimised: 0 is the parents themselves
    agreement: head ("a", "b" or "shared") -> share of images for which the network chooses the parents'
               class; where outputs are no logits, the share of their variance that it explains
    """

    loss: float
    agreement: Mapping[str, float]

    @property
    def mean_agreement(self) -> float:
        return sum(self.agreement.values()) / len(self.agreement)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss)

    def better_than(self, best: Evidence, start: Evidence) -> bool:
        """Closer to the parents than the best so far, and in no less agreement with them than the start."""
        return self.loss < best.loss - TINY and self.mean_agreement >= start.mean_agreement


class Parents:
    """Both parents as one teacher: their logits side by side, or for a shared head their mean."""

    def __init__(
        self, a: nn.Module, b: nn.Module, normalise_a: Normalise, normalise_b: Normalise, shared: bool
    ) -> None:
        self._parents = (("A", a, normalise_a), ("B", b, normalise_b))
        self.shared = shared

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> float32 (N, K) or (N, K_a + K_b). Raises NonFinite, naming the parent."""
        return self.together(self.answers(images))

    def inputs(self, images: Tensor) -> list[Tensor]:
        """What each parent sees of uint8 images."""
        return [normalise(images) for _, _, normalise in self._parents]

    def together(self, outputs: list[Tensor]) -> Tensor:
        """One target of each parent's own outputs."""
        return (outputs[0] + outputs[1]) / 2 if self.shared else torch.cat(outputs, 1)

    def answers(self, images: Tensor) -> list[Tensor]:
        """Each parent's own outputs, float32 (N, K_a) and (N, K_b)."""
        with torch.no_grad():
            return [self._answer(*parent, images) for parent in self._parents]

    def _answer(self, name: str, parent: nn.Module, normalise: Normalise, images: Tensor) -> Tensor:
        output = parent(normalise(images)).float()
        if not output.isfinite().all():
            raise NonFinite(
                f"parent {name} returns NaN or infinity on proxy images, so nothing can be learnt from it: "
                "check its weights and preprocessing"
            )
        return output


def kind_of_outputs(answers: Sequence[Tensor]) -> tuple[Outputs, str | None]:
    """What the parents return, (N, K) each; with the sentence to say about it for anything but logits."""
    for name, answer in zip("AB", answers, strict=True):
        found = _not_logits(answer)
        if found:
            return "values", (
                f"parent {name} returns {found}, which are no logits over classes: refining fits the "
                "outputs themselves by squared error, without softmax and temperature"
            )
    return "logits", None


def _not_logits(answer: Tensor) -> str | None:
    if answer.shape[1] == 1:
        return "one number per image"
    if bool((answer >= 0).all()) and torch.allclose(answer.sum(1), torch.ones(len(answer)), atol=1e-3):
        return "numbers that sum to 1 (probabilities)"
    norms = torch.linalg.vector_norm(answer, dim=1)
    if torch.allclose(norms, norms.mean(), rtol=1e-3, atol=0.0):
        return "vectors of one length (an embedding)"
    return None


@dataclass(frozen=True)
class Objective:
    """The distillation loss.

    heads: name -> columns        scale: the outputs' variance, where they are no logits
    """

    heads: Mapping[str, slice]
    outputs: Outputs
    settings: RefineSettings
    scale: float = 1.0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean over heads of T^2 KL(target / T || output / T) + logit_weight * mean squared error."""
        output = output.float()
        if self.outputs == "values":
            return F.mse_loss(output, target) / self.scale
        losses = [self._divergence(output[:, head], target[:, head]) for head in self.heads.values()]
        loss = torch.stack(losses).mean() + self.settings.logit_weight * F.mse_loss(output, target)
        if self.settings.joint_weight and len(self.heads) > 1:
            loss = loss + self.settings.joint_weight * self._divergence(output, target)
        return loss

    def _divergence(self, output: Tensor, target: Tensor) -> Tensor:
        temperature = self.settings.temperature
        ours = F.log_softmax(output / temperature, 1)
        theirs = F.log_softmax(target / temperature, 1)
        return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)

    def judge(self, output: Tensor, target: Tensor) -> Evidence:
        """Evidence of all held-out outputs together."""
        agreement = {
            name: self._agreement(output[:, head].float(), target[:, head])
            for name, head in self.heads.items()
        }
        return Evidence(float(self(output, target)), agreement)

    def _agreement(self, output: Tensor, target: Tensor) -> float:
        if self.outputs == "logits":
            return float((output.argmax(1) == target.argmax(1)).float().mean())
        spread = (target - target.mean(0)).square().sum()
        return 1 - float((output - target).square().sum() / spread.clamp_min(torch.finfo(spread.dtype).tiny))


def heads_of(sizes: Sequence[int], shared: bool) -> dict[str, slice]:
    """Output columns of every head; sizes: (K_a, K_b)."""
    if shared:
        return {"shared": slice(0, sizes[0])}
    return {"a": slice(0, sizes[0]), "b": slice(sizes[0], sizes[0] + sizes[1])}
