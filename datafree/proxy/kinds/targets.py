"""What an inverted network asks of images: its batch norms' statistics, or that it takes them for its classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from datafree.errors import UsageError
from datafree.images.preprocess import Preprocess

if TYPE_CHECKING:
    from datafree.models.parent import Parent

_BatchNorm = nn.modules.batchnorm._BatchNorm
_ORDINARY = 1.5  # times what chance leaves on average: 19 of 20 batches of real images are within 1.5 to 1.8
_CONFIDENT = 0.1  # nats over the least cross-entropy there is: images count as being of their classes
_SMOOTHING = 0.1  # of the labels: images are to look like a class, not to be extreme cases of it


@dataclass(frozen=True)
class Target:
    """One parent, and those of its batch-norm layers that were trained; none for `loss: classes`."""

    parent: Parent
    layers: tuple[_BatchNorm, ...]
    notes: tuple[str, ...]

    @staticmethod
    def of(parent: Parent) -> Target:
        named = {
            name: module for name, module in parent.module.named_modules() if isinstance(module, _BatchNorm)
        }
        stored = {name: layer for name, layer in named.items() if layer.running_mean is not None}
        trained = {name: layer for name, layer in stored.items() if not _untouched(layer)}
        if not trained:
            why = (
                f"all its {len(stored)} batch-norm layers still have mean 0 and variance 1, so it was "
                "never trained"
                if stored
                else "it has no batch-norm layer with running statistics"
            )
            raise UsageError(
                f"parent {parent.name} ({parent.reference}) cannot be inverted: {why}. Use another source: "
                "public images (kind: images), diffusion samples (kind: diffusion), or procedural images; or "
                "invert its predictions (loss: classes)"
            )
        skipped = sorted(set(stored) - set(trained))
        notes = []
        if skipped:
            more = ", ..." if len(skipped) > 5 else ""
            notes.append(
                f"parent {parent.name}: {len(skipped)} of {len(stored)} batch-norm layers were never trained "
                f"(mean 0, variance 1) and are left out of the inversion: {', '.join(skipped[:5])}{more}"
            )
        return Target(parent, tuple(trained.values()), tuple(notes))

    def pixels_in(self, pixels: Tensor) -> Tensor:
        """This parent's input for pixels in [0, 1], (n, channels, height, width)."""
        return normalised(pixels, self.parent.preprocess)

    def loss(self, pixels: Tensor, first: int = 0) -> Tensor:
        """What is minimised besides smoothness, a scalar: L_BN, or the cross-entropy where no layer is matched."""
        statistics, classes = self.losses(pixels, first)
        return statistics if self.layers else classes

    def losses(self, pixels: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """L_BN, and the cross-entropy to classes dealt in turn, from image number `first` on."""
        statistics, classes, _ = self.answers(pixels, first)
        return statistics, classes

    def answers(self, pixels: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Both losses, and the logits, (n, outputs)."""
        with _listening(self.layers) as terms:
            logits = self.parent.module(self.pixels_in(pixels))
        labels = torch.arange(first, first + len(pixels), device=logits.device) % logits.shape[1]
        classes = functional.cross_entropy(logits, labels, label_smoothing=_SMOOTHING)
        return torch.stack(terms).mean() if terms else classes.new_zeros(()), classes, logits

    def first_term(self, pixels: Tensor) -> Tensor:
        """The term of L_BN of the batch norm that runs first, a scalar; the network runs no further than that."""
        with _listening(self.layers, stop=True) as terms, suppress(_HeardEnough):
            self.parent.module(self.pixels_in(pixels))
        return terms[0]

    @torch.no_grad()
    def goal(self, pixels: Tensor) -> float:
        """The loss at which a descent has done enough for `pixels` in [0, 1], (n, channels, height, width)."""
        if self.layers:
            return _ORDINARY * self.sampling_error(pixels)
        others = self.parent.outputs - 1
        shares = torch.tensor(
            [1 - _SMOOTHING + _SMOOTHING / (others + 1), *[_SMOOTHING / (others + 1)] * others]
        )
        return float(torch.special.entr(shares).sum()) + _CONFIDENT

    @torch.no_grad()
    def sampling_error(self, pixels: Tensor) -> float:
        """L_BN that as many images drawn from the training data would have: what chance alone leaves.

        Images are drawn independently, positions in one are not, so images are counted. With m_i the mean over
        positions of a channel in image i, and q_i that of its squared distance from the batch's mean m, the batch has
        m = mean of m_i and v = mean of q_i, hence, to first order in 1/n,

            E (m - mu)^2 / var = Var(m_i) / (n var)        E (log v / var)^2 = Var(q_i) / (n var^2)

        Both variances between images are estimated from the batch. docs/decisions/0010 compares with real images.
        """
        terms: list[Tensor] = []

        def listen(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            terms.append(_chance(inputs[0].float(), layer.eps))  # pyright: ignore[reportArgumentType]

        handles = [layer.register_forward_pre_hook(listen) for layer in self.layers]
        try:
            self.parent.module(self.pixels_in(pixels))
        finally:
            for handle in handles:
                handle.remove()
        return float(torch.stack(terms).mean())


class _HeardEnough(Exception):
    """Ends a network's run after its first batch norm."""


def _chance(value: Tensor, eps: float) -> Tensor:
    """Expected term of L_BN of one layer, from its input (n, channels, ...): see `Target.sampling_error`."""
    value = value.flatten(2) if value.dim() > 2 else value.unsqueeze(2)
    each = value.mean(2)
    square = (value - each.mean(0)[:, None]).square().mean(2)
    variance = square.mean(0) + eps
    return (each.var(0) / variance + square.var(0) / variance.square()).mean() / len(value)


def normalised(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """A network's input for pixels in [0, 1], (n, channels, height, width)."""
    mean, std = (
        torch.tensor(x, device=pixels.device).view(-1, 1, 1) for x in (preprocess.mean, preprocess.std)
    )
    return (pixels - mean) / std


def _untouched(layer: _BatchNorm) -> bool:
    """Whether the running statistics are still those of a new layer."""
    mean, variance = layer.running_mean, layer.running_var
    assert mean is not None
    assert variance is not None
    return bool((mean == 0).all() and (variance == 1).all())


@contextmanager
def _listening(layers: Sequence[_BatchNorm], *, stop: bool = False) -> Iterator[list[Tensor]]:
    """Collects each layer's term of L_BN from its input while the network runs.

    stop: _HeardEnough is raised at the first
    """
    terms: list[Tensor] = []

    def listen(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, _BatchNorm)
        term = StatisticsLoss.apply(inputs[0], layer.running_mean, layer.running_var, layer.eps)
        assert isinstance(term, Tensor)
        terms.append(term)
        if stop:
            raise _HeardEnough

    handles = [layer.register_forward_pre_hook(listen) for layer in layers]
    try:
        yield terms
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def at_work_on(device: torch.device, targets: Sequence[Target]) -> Iterator[None]:
    """The parents moved to `device` for the while, parameters frozen, in evaluation mode."""
    homes = [next(target.parent.module.parameters()).device for target in targets]
    try:
        for target in targets:
            target.parent.module.to(device)
        yield
    finally:
        for target, home in zip(targets, homes, strict=True):
            target.parent.module.to(home)


class StatisticsLoss(torch.autograd.Function):
    """One layer's term of L_BN, averaged over its channels.

    The gradient is affine in the input, channel by channel, so it is written down instead of recorded: with
    sums that run along contiguous memory this costs a few per cent of a step, where `torch.var_mean` costs
    as much as a convolution.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
        channels = value.shape[1]
        count = value.numel() // channels
        flat = value.reshape(len(value), channels, -1)
        if flat.dtype in (torch.float16, torch.bfloat16):
            flat = flat.float()
        found = flat.sum(2).sum(0) / count
        square = torch.linalg.vector_norm(flat, dim=2).square().sum(0) / count
        spread = (square - found.square()).clamp_min(0) + eps
        offset, ratio = found - mean, torch.log(spread / (variance + eps))
        slope = 4 * ratio / spread / (count * channels)
        constant = 2 * offset / (variance + eps) / (count * channels) - slope * found
        ctx.save_for_backward(value, slope, constant)
        return (offset.square() / (variance + eps) + ratio.square()).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        value, slope, constant = ctx.saved_tensors
        shape = (1, -1, *(1 for _ in value.shape[2:]))
        slope, constant = (slope * gradients[0]).view(shape), (constant * gradients[0]).view(shape)
        return torch.addcmul(constant, value, slope).to(value.dtype), None, None, None
