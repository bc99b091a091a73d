"""What the merged network learns from its parents, and how close to them it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pleas.errors import NonFinite
from pleas.heads import together
from pleas.refine.settings import RefineSettings
from pleas.settings import Heads
from pleas.statistics.domains import answer_and_distance, shares_of

Normalise = Callable[[Tensor], Tensor]  # uint8 (N, C, H, W) -> a network's input
Outputs = Literal["logits", "values"]

TINY = 1e-6  # a loss that rounding alone can make


@dataclass(frozen=True)
class Closeness:
    """How close a network is to its parents on the held-out images.

    loss:      what is minimised: 0 is the parents themselves
    agreement: head (a teacher's name, or "shared") -> share of images for which the network chooses the parents'
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


@dataclass(frozen=True)
class Teacher:
    """A parent that the merged network learns from.

    name:      what messages call it, and its head where every parent has its own
    normalise: makes uint8 images its input; None: as the merged network's
    """

    name: str
    module: nn.Module
    normalise: Normalise | None = None


class Teachers:
    """All parents as one teacher: their logits side by side, for a shared head their mean, or their union.

    places:  of every parent's outputs among the merged ones, with a union
    typical: how far each parent's own images are from it (`pleas.statistics.domains`), so that in every image the
             parent counts most whose domain it is of, in the mean or head by head; None: all count alike
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        normalise: Normalise,
        heads: Heads,
        places: Sequence[Sequence[int]] | None = None,
        *,
        typical: Tensor | None = None,
    ) -> None:
        self._teachers, self._normalise = tuple(teachers), normalise
        self.heads: Heads = heads
        self.places = places
        self._typical = typical

    @property
    def names(self) -> list[str]:
        return [teacher.name for teacher in self._teachers]

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> float32 (N, K), or of all heads; see `answers`."""
        return self.together(*self.heard(images))

    def inputs(self, images: Tensor) -> list[Tensor]:
        """What each parent sees of uint8 images."""
        return [self._input(teacher, images) for teacher in self._teachers]

    def together(self, outputs: Sequence[Tensor], shares: Tensor | None = None) -> Tensor:
        """One target of each parent's own outputs; shares: how much each counts in every image, (N, parents)."""
        if shares is None or self.heads != "shared":
            return together(outputs, self.heads, self.places)
        return torch.einsum("pnk,np->nk", torch.stack(list(outputs)), shares.to(outputs[0]))

    def answers(self, images: Tensor) -> list[Tensor]:
        """Each parent's own outputs, float32 (N, K_p). Raises NonFinite, naming the parent."""
        return self.heard(images)[0]

    def heard(self, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Each parent's own outputs, and how much each counts; None: all alike. Raises as `answers`."""
        with torch.no_grad():
            if self._typical is None:
                return [self._answer(teacher, images) for teacher in self._teachers], None
            found = [answer_and_distance(one.module, self._input(one, images)) for one in self._teachers]
            answers = [_finite(one, x) for one, (x, _) in zip(self._teachers, found, strict=True)]
            distances = torch.stack([distance for _, distance in found], 1)
            return answers, shares_of(distances, self._typical.to(distances))

    def _input(self, teacher: Teacher, images: Tensor) -> Tensor:
        return (teacher.normalise or self._normalise)(images)

    def _answer(self, teacher: Teacher, images: Tensor) -> Tensor:
        return _finite(teacher, teacher.module(self._input(teacher, images)))


def _finite(teacher: Teacher, output: Tensor) -> Tensor:
    output = output.float()
    if not output.isfinite().all():
        raise NonFinite(
            f"parent {teacher.name} returns NaN or infinity on proxy images, so nothing can be learnt from it: "
            "check its weights and preprocessing"
        )
    return output


def kind_of_outputs(answers: Mapping[str, Tensor]) -> tuple[Outputs, str | None]:
    """What the parents return, (N, K) each by name; with the sentence to say about it for anything but logits."""
    for name, answer in answers.items():
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

    heads: Mapping[str, slice | list[int]]
    outputs: Outputs
    settings: RefineSettings
    scale: float = 1.0

    def __call__(self, output: Tensor, target: Tensor, shares: Tensor | None = None) -> Tensor:
        """Mean over heads of T^2 KL(target / T || output / T) + logit_weight * mean squared error.

        shares: how much each of several heads counts in an image, (N, heads)
        """
        return self.each(output, target, shares).mean()

    def each(self, output: Tensor, target: Tensor, shares: Tensor | None = None) -> Tensor:
        """The same image by image: (N,)."""
        output = output.float()
        if shares is not None and len(self.heads) > 1:
            return self._by_head(output, target, shares)
        squared = (output - target).square().mean(1)
        if self.outputs == "values":
            return squared / self.scale
        losses = [self._divergence(output[:, head], target[:, head]) for head in self.heads.values()]
        loss = torch.stack(losses).mean(0) + self.settings.logit_weight * squared
        if self.settings.joint_weight and len(self.heads) > 1:
            loss = loss + self.settings.joint_weight * self._divergence(output, target)
        return loss

    def _by_head(self, output: Tensor, target: Tensor, shares: Tensor) -> Tensor:
        losses = []
        for head in self.heads.values():
            ours, theirs = output[:, head], target[:, head]
            squared = (ours - theirs).square().mean(1)
            if self.outputs == "values":
                losses.append(squared / self.scale)
            else:
                losses.append(self._divergence(ours, theirs) + self.settings.logit_weight * squared)
        loss = (torch.stack(losses, 1) * shares.to(output)).sum(1)
        if self.settings.joint_weight and self.outputs == "logits":
            loss = loss + self.settings.joint_weight * self._divergence(output, target)
        return loss

    def _divergence(self, output: Tensor, target: Tensor) -> Tensor:
        temperature = self.settings.temperature
        ours = F.log_softmax(output / temperature, 1)
        theirs = F.log_softmax(target / temperature, 1)
        return temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)

    def agreement(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Every image's part in the agreement of a head, (N,); its mean is the agreement."""
        return {
            name: self._agreement(output[:, head].double(), target[:, head].double())
            for name, head in self.heads.items()
        }

    def _agreement(self, output: Tensor, target: Tensor) -> Tensor:
        if self.outputs == "logits":
            return (output.argmax(1) == target.argmax(1)).double()
        spread = (target - target.mean(0)).square().sum(1).mean()
        return 1 - (output - target).square().sum(1) / spread.clamp_min(torch.finfo(spread.dtype).tiny)


def heads_of(
    sizes: Mapping[str, int], heads: Heads, places: Sequence[Sequence[int]] | None = None
) -> dict[str, slice | list[int]]:
    """Output columns of every head; sizes: outputs of each parent, by name."""
    ends = list(accumulate(sizes.values()))
    if heads == "shared":
        return {"shared": slice(0, ends[0])}
    if places is not None:
        return {name: list(own) for name, own in zip(sizes, places, strict=True)}
    return {name: slice(end - sizes[name], end) for name, end in zip(sizes, ends, strict=True)}
