"""Images found by inverting the parents: their batch norms remember the statistics of the training data.

Every batch-norm layer of a trained network stores the mean and variance of its input over the training set. Images are
changed, by gradient descent on their pixels, until the network's own activations on them have those statistics:

    L_BN = mean over layers, mean over channels of  (m - mu)^2 / (var + eps) + (log((v + eps) / (var + eps)))^2

with m, v the mean and variance over the batch and mu, var the stored ones. It has no scale: one weight suits every
layer width, batch and network, and losses of several networks add up. No labels are used. The descent starts from
procedural images in the colours that the first batch norm remembers (`starts.py`), which saves most of the steps
against a start from noise, and goes on until the statistics are as close to the stored ones as those of as many real
images would be (`steps: auto`, docs/decisions/0010).

A network without batch norm remembers no statistics. What can be asked of it is `loss: classes`: images that it takes
for its classes, each as often as the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional

from datafree.errors import RunError, UsageError
from datafree.images.preprocess import Preprocess, match_channels
from datafree.proxy.kinds.procedural import Mix, paint
from datafree.proxy.kinds.starts import fit_colours
from datafree.proxy.kinds.targets import Target, at_work_on, normalised
from datafree.proxy.source import SHARD, Request, Shard, Source, SourceSpec, register

if TYPE_CHECKING:
    from datafree.models.parent import Parent

_FIRST_ROUND = 20  # steps
_SHORTEST, _LONGEST = 1.0, 2.0  # a later round, as a share of the steps before it
_WORTH = 0.1  # another round follows one that lowered what is over the goal by this share
_HIGH = 2.0  # times the goal: a loss over that is said


@register
class InversionSpec(SourceSpec):
    """Inversion of the parents.

    loss:   statistics: those of the batch norms; classes: every image is made to look like a class, dealt evenly, to
            the network: for those without batch norm, such as vision transformers
    mode:   split: every shard's images are dealt to the parents in turn, each inverts its own part;
            joint: every image serves both parents at once, for parents trained on the same kind of data
    steps:  of Adam; auto: 20, and further rounds until the loss is what as many images of the training data would have,
            or a round no longer lowers it by a tenth; each shard and parent for itself
    max_steps: the most that `steps: auto` takes
    rate:   the largest step, in pixel values on [0, 1]; in every round it warms up, then falls along a cosine
    smooth: weight of total variation    jitter: largest shift, as a fraction of the side
    start:  what the descent starts from    fit: recolour it first, so that the first batch norm finds its statistics
    coarse: share of the steps that is done first, on images of half the side
    enough: stop where the loss is no more than this, None: all steps are done, or what `auto` decides
    half:   bfloat16 arithmetic where the device is a GPU
    class_weight: of the cross-entropy to classes beside `loss: statistics`; 0: images belong to no class
    """

    version: ClassVar[int] = 2
    later: ClassVar[frozenset[str]] = frozenset({"loss", "coarse", "enough", "half", "class_weight"})

    kind: Literal["inversion"] = "inversion"
    loss: Literal["statistics", "classes"] = "statistics"
    mode: Literal["split", "joint"] = "split"
    steps: Annotated[int, pydantic.Field(ge=1)] | Literal["auto"] = "auto"
    max_steps: int = pydantic.Field(default=600, ge=1)
    rate: float = pydantic.Field(default=0.03, gt=0)
    smooth: float = pydantic.Field(default=0.05, ge=0)
    jitter: float = pydantic.Field(default=0.0625, ge=0, le=0.5)
    flip: bool = True
    start: Literal["procedural", "noise"] = "procedural"
    fit: bool = True
    coarse: float = pydantic.Field(default=0.0, ge=0, lt=1)
    enough: float | None = pydantic.Field(default=None, gt=0)
    half: bool = False
    class_weight: float = pydantic.Field(default=0.0, ge=0)

    @pydantic.model_validator(mode="after")
    def _one_class_term(self) -> InversionSpec:
        if self.loss == "classes" and self.class_weight:
            raise ValueError("class_weight stands beside loss: statistics; with loss: classes remove it")
        return self

    @pydantic.model_validator(mode="after")
    def _a_share_of_something(self) -> InversionSpec:
        if self.coarse and self.steps == "auto":
            raise ValueError(
                "coarse is a share of the steps, so it needs a number: write steps, or remove coarse"
            )
        return self

    def verdict(self, facts: Mapping[str, Any]) -> Sequence[str]:
        if self.steps != "auto" or self.loss != "statistics":
            return ()
        high = [name for name, loss in facts["bn_loss"].items() if loss > _HIGH * facts["bn_loss_goal"][name]]
        return [self._complaint(name, facts) for name in high]

    def _complaint(self, name: str, facts: Mapping[str, Any]) -> str:
        how, remedy = (
            f"it got no further after {facts['steps'][name]:.0f} steps",
            "set start: noise or another rate",
        )
        if facts["cut_off"][name] >= 0.5:  # of the shards
            how = f"it was cut off at {self.max_steps} steps"
            remedy = f"raise max_steps ({self.max_steps})"
        return (
            f"inversion of parent {name} did not converge: {how} with a batch-norm loss of "
            f"{facts['bn_loss'][name]:.3f}, where as many images of its training data would have about "
            f"{facts['bn_loss_goal'][name]:.3f}, so its images are poor proxies: {remedy} in proxy.sources, or use "
            "public images (kind: images)"
        )

    def bind(self, request: Request) -> Source:
        if self.loss == "statistics":
            targets = [Target.of(parent) for parent in request.parents]
        else:
            targets = [Target(parent, (), ()) for parent in request.parents]
        if self.coarse:
            for target in targets:
                _check_half_size(target.parent, request)
        return _Inversion(self, request, targets)


@dataclass(frozen=True)
class Opponent:
    """A network that should answer as the parents do, and images are looked for on which it does not.

    This is the competition of DeepInversion (arXiv 1912.08795, equation 9).

    network, preprocess: what it computes, and of what    columns: of its output, for each parent by name
    weight: of the disagreement, which is between 0 and log 2, beside the parents' own loss
    """

    network: nn.Module
    preprocess: Preprocess
    columns: Mapping[str, slice | list[int]]
    weight: float

    def disagreement(self, pixels: Tensor, parent: str, logits: Tensor) -> Tensor:
        """Mean Jensen-Shannon divergence of its predictions and the parent's; pixels in [0, 1]."""
        output = self.network(normalised(pixels, self.preprocess))[:, self.columns[parent]]
        ours, theirs = (functional.log_softmax(x.float(), 1) for x in (output, logits))
        middle = torch.logaddexp(ours, theirs) - math.log(2)
        both = [functional.kl_div(middle, x, reduction="batchmean", log_target=True) for x in (ours, theirs)]
        return (both[0] + both[1]) / 2


def images_in_dispute(spec: InversionSpec, request: Request, opponent: Opponent, count: int) -> Tensor:
    """Inverted images on which `opponent` and the parents disagree, uint8 (count, channels, height, width)."""
    source = spec.bind(request)
    assert isinstance(source, _Inversion)
    source.opponent = opponent
    shards = [source.shard(index).images for index in range(-(-count // SHARD))]
    return torch.cat(shards)[:count]


class _Inversion:
    def __init__(self, spec: InversionSpec, request: Request, targets: Sequence[Target]) -> None:
        self.opponent: Opponent | None = None
        self._spec = spec
        self._request = request
        self._targets = targets
        self.limit: int | None = None
        self.notes: Sequence[str] = tuple(note for target in targets for note in target.notes)

    def key(self) -> Mapping[str, Any]:
        return {
            "parents": [
                [
                    target.parent.fingerprint,
                    target.parent.reference,
                    list(target.parent.preprocess.mean),
                    list(target.parent.preprocess.std),
                ]
                for target in self._targets
            ]
        }

    def shard(self, index: int) -> Shard:
        pixels = self._start(index).to(self._request.device)
        images = torch.empty_like(pixels, dtype=torch.uint8)
        losses: dict[str, float] = {}
        goals: dict[str, float] = {}
        steps: dict[str, int] = {}
        cut_off: dict[str, bool] = {}
        for number, (targets, rows) in enumerate(self._groups()):
            with at_work_on(self._request.device, targets):
                generator = self._request.generator(index, "descent", str(number))
                first = index * len(pixels[rows])
                found, taken, cut = self._descend(pixels[rows], targets, generator, first)
                images[rows] = _bytes(found)
                losses |= self._losses(images[rows], targets, first)
                steps |= {target.parent.name: taken for target in targets}
                cut_off |= {target.parent.name: cut for target in targets}
                goals |= self._goals(images[rows], targets)
        if self._spec.loss == "classes":
            return Shard(images.cpu(), {"class_loss": losses, "steps": steps})
        facts: dict[str, Any] = {"bn_loss": losses, "bn_loss_goal": goals, "steps": steps, "cut_off": cut_off}
        if self._spec.mode == "joint" and index == 0:
            facts |= self._compatibility(pixels, losses)
        return Shard(images.cpu(), facts)

    def _groups(self) -> list[tuple[list[Target], slice]]:
        """Who shapes which images of a shard."""
        if self._spec.mode == "joint":
            return [(list(self._targets), slice(None))]
        count = len(self._targets)  # dealt in turn, so that every prefix of the shard is shared evenly
        return [([target], slice(number, None, count)) for number, target in enumerate(self._targets)]

    @torch.no_grad()
    def _losses(self, images: Tensor, targets: Sequence[Target], first: int) -> dict[str, float]:
        """The loss of uint8 images for each parent."""
        return {target.parent.name: float(target.loss(images.float() / 255, first)) for target in targets}

    def _goals(self, images: Tensor, targets: Sequence[Target]) -> dict[str, float]:
        """The loss at which each parent is content with uint8 images."""
        if self._spec.enough is not None:
            return {target.parent.name: self._spec.enough for target in targets}
        return {target.parent.name: target.goal(images.float() / 255) for target in targets}

    def _compatibility(self, pixels: Tensor, joint: Mapping[str, float]) -> dict[str, Any]:
        """What each parent's loss is when it has the same images to itself, and a warning where that is far less."""
        alone: dict[str, float] = {}
        for number, target in enumerate(self._targets):
            with at_work_on(self._request.device, [target]):
                generator = self._request.generator(0, "alone", str(number))
                found, _, _ = self._descend(pixels, [target], generator, 0)
                alone |= self._losses(_bytes(found), [target], 0)
        torn = [name for name in alone if joint[name] > 2 * alone[name]]
        if not torn:
            return {"bn_loss_alone": alone}
        shown = ", ".join(f"{name} {joint[name]:.3f} against {alone[name]:.3f} alone" for name in torn)
        return {
            "bn_loss_alone": alone,
            "notes": [
                f"joint inversion: no images suit both parents' statistics (loss of {shown}): the parents were "
                "probably trained on different kinds of images; mode: split serves each by its own"
            ],
        }

    def _start(self, index: int) -> Tensor:
        """float32 (SHARD, channels, height, width) in [0, 1]."""
        generator = self._request.generator(index, "start")
        shape = (SHARD, self._request.channels, *self._request.size)
        if self._spec.start == "noise":
            return (torch.randn(shape, generator=generator) * 0.25 + 0.5).clamp(0, 1)
        painted = (paint(Mix(), SHARD, self._request.size, generator) * 255).round().to(torch.uint8)
        return match_channels(painted, self._request.channels).float() / 255

    def _descend(
        self, pixels: Tensor, targets: Sequence[Target], generator: torch.Generator, number: int
    ) -> tuple[Tensor, int, bool]:
        """The images, in [0, 1]; the steps it took; and whether max_steps ended it before it was content.

        number: of the first image among all that these targets shape, which decides its class
        """
        spec, size = self._spec, self._request.size
        if spec.fit and spec.loss == "statistics":
            pixels = fit_colours(pixels, targets)
        if spec.steps == "auto":
            return self._rounds(pixels, targets, generator, number)
        first = round(spec.coarse * spec.steps)
        taken = 0
        if first:
            half = functional.interpolate(pixels, _half(size), mode="area")
            half, taken = self._adam(half, targets, generator, first, number)
            pixels = functional.interpolate(half, size, mode="bilinear", align_corners=False)
        pixels, more = self._adam(pixels, targets, generator, spec.steps - first, number)
        return pixels, taken + more, False

    def _rounds(
        self, pixels: Tensor, targets: Sequence[Target], generator: torch.Generator, number: int
    ) -> tuple[Tensor, int, bool]:
        """Rounds of descent, each with a schedule of its own, until the loss is at its goal or another is not worth it.

        Losses fall about as one over the steps, which tells how many are missing. A pure function of its arguments: no
        clock, and nothing of other shards, decides (docs/decisions/0010).
        """
        best, taken, length, ratio = pixels, 0, _FIRST_ROUND, math.inf
        while taken < self._spec.max_steps:
            length = min(length, self._spec.max_steps - taken)
            pixels, done = self._adam(best, targets, generator, length, number)
            taken += done
            reached = self._ratio(_bytes(pixels), targets, number)
            worth = reached - 1 <= (1 - _WORTH) * (ratio - 1)
            if reached < ratio:
                best, ratio = pixels, reached
            if ratio <= 1 or not worth:
                return best, taken, False
            length = round(taken * min(max(ratio - 1, _SHORTEST), _LONGEST))
        return best, taken, True

    def _ratio(self, images: Tensor, targets: Sequence[Target], number: int) -> float:
        """The loss of uint8 images over its goal, of the target that is furthest from being content."""
        losses, goals = self._losses(images, targets, number), self._goals(images, targets)
        return max(losses[name] / goals[name] for name in goals)

    def _adam(
        self,
        pixels: Tensor,
        targets: Sequence[Target],
        generator: torch.Generator,
        steps: int,
        number: int,
    ) -> tuple[Tensor, int]:
        """The images after one schedule of `steps`, and how many of them were done before `enough` was reached."""
        spec = self._spec
        pixels = pixels.clone().requires_grad_()
        optimiser = torch.optim.Adam([pixels], lr=spec.rate, betas=(0.5, 0.9))
        height, width = pixels.shape[-2:]
        reach = (round(spec.jitter * height), round(spec.jitter * width))
        half = spec.half and pixels.device.type == "cuda"
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = spec.rate * schedule(step, steps)
            with torch.enable_grad():
                seen = _shifted(pixels, reach, spec.flip, generator)
                with torch.autocast(pixels.device.type, torch.bfloat16, enabled=half):
                    found = [target.answers(seen, number) for target in targets]
                fits, classes = (torch.stack([x[i] for x in found]).float().sum() for i in (0, 1))
                if spec.loss == "classes":
                    fits = classes
                loss = fits + spec.smooth * total_variation(pixels)
                if spec.class_weight:
                    loss = loss + spec.class_weight * classes
                if self.opponent is not None:
                    for target, (_, _, logits) in zip(targets, found, strict=True):
                        dispute = self.opponent.disagreement(seen, target.parent.name, logits)
                        loss = loss - self.opponent.weight * dispute
            if spec.enough is not None and fits <= spec.enough * len(targets):
                return pixels.detach(), step
            (pixels.grad,) = torch.autograd.grad(loss, [pixels])
            if not torch.isfinite(loss):
                raise RunError(
                    f"inversion of {' and '.join(target.parent.name for target in targets)} met a loss "
                    f"that is not finite at step {step + 1}: lower proxy rate ({spec.rate:g})"
                )
            optimiser.step()
            with torch.no_grad():
                pixels.clamp_(0, 1)
        return pixels.detach(), steps


def _bytes(pixels: Tensor) -> Tensor:
    """uint8 of pixels in [0, 1]."""
    return (pixels * 255).round().to(torch.uint8)


def _half(size: tuple[int, int]) -> tuple[int, int]:
    return max(1, size[0] // 2), max(1, size[1] // 2)


@torch.no_grad()
def _check_half_size(parent: Parent, request: Request) -> None:
    """Raises UsageError where the parent cannot take images of half the side, as a vision transformer cannot."""
    height, width = _half(request.size)
    home = next(parent.module.parameters()).device
    try:
        parent.module(torch.zeros(2, request.channels, height, width, device=home))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(
            f"coarse: parent {parent.name} cannot take images of half the side, {height} x {width} "
            f"({str(error).splitlines()[0]}): remove coarse from proxy.sources"
        ) from error


def schedule(step: int, steps: int) -> float:
    """Share of the full rate at `step`: a linear rise over the first tenth, then a cosine to zero."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def total_variation(pixels: Tensor) -> Tensor:
    """Mean absolute difference of neighbours, down and across."""
    down = (pixels[..., 1:, :] - pixels[..., :-1, :]).abs().mean()
    across = (pixels[..., :, 1:] - pixels[..., :, :-1]).abs().mean()
    return down + across


def _shifted(pixels: Tensor, reach: tuple[int, int], flip: bool, generator: torch.Generator) -> Tensor:
    """The batch moved by one random offset, edges mirrored, and mirrored as a whole half of the time."""
    down, across = (int(torch.randint(0, 2 * r + 1, (), generator=generator)) for r in reach)
    mirrored = flip and bool(torch.rand((), generator=generator) < 0.5)
    if any(reach):
        height, width = pixels.shape[-2:]
        pixels = functional.pad(pixels, (reach[1], reach[1], reach[0], reach[0]), mode="reflect")
        pixels = pixels[..., down : down + height, across : across + width]
    return pixels.flip(-1) if mirrored else pixels
