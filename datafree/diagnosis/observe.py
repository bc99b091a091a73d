"""What one network makes of a set of images: batch-norm statistics against the stored ones, and its predictions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from datafree.models.parent import Parent

_BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class NormDistance:
    """How far the input of one batch-norm layer is from what the layer saw in training.

    mean:    sqrt(mean over channels of (m - mu)^2 / (var + eps))
    log_var: mean over channels of |log (v + eps) / (var + eps)|
    """

    layer: str
    mean: float
    log_var: float


@dataclass(frozen=True)
class Observation:
    """One parent on one set of images.

    entropy:     of the mean prediction, in nats; `entropy_limit` is the most it can be, log min(classes, images)
    predictions: int64 (images,), the most likely class of each
    """

    parent: str
    norms: tuple[NormDistance, ...]
    entropy: float
    entropy_limit: float
    predictions: Tensor

    @property
    def spread(self) -> float:
        """The entropy as a share of the most it can be."""
        return self.entropy / self.entropy_limit if self.entropy_limit else 0.0

    @property
    def bn_mean(self) -> float | None:
        return _mean([norm.mean for norm in self.norms])

    @property
    def bn_log_var(self) -> float | None:
        return _mean([norm.log_var for norm in self.norms])


def observe(parent: Parent, batches: Iterable[Tensor], device: torch.device) -> Observation:
    """One pass of `parent` over uint8 batches (n, C, H, W). Sums run in float64; hooks are gone afterwards."""
    return watch(parent, batches, device).observation()


@dataclass(frozen=True)
class Sums:
    """What a pass adds up: two sets of images together have the sum of their sums."""

    parent: str
    norms: tuple[_NormSums, ...]
    probabilities: Tensor
    predictions: Tensor

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.parent,
            tuple(mine + theirs for mine, theirs in zip(self.norms, other.norms, strict=True)),
            self.probabilities + other.probabilities,
            torch.cat([self.predictions, other.predictions]),
        )

    def observation(self) -> Observation:
        mean = (self.probabilities / len(self.predictions)).cpu()
        entropy = float(-(mean * mean.clamp_min(1e-300).log()).sum())
        limit = math.log(min(len(mean), len(self.predictions)))
        norms = tuple(sums.distance() for sums in self.norms if sums.count)  # others run in training alone
        return Observation(self.parent, norms, entropy, limit, self.predictions)


@torch.no_grad()
def watch(parent: Parent, batches: Iterable[Tensor], device: torch.device) -> Sums:
    """The sums of one pass of `parent` over uint8 batches (n, C, H, W)."""
    watched = {
        name: _NormSums(name, layer)
        for name, layer in parent.module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }
    layers = dict(parent.module.named_modules())
    home = next(parent.module.parameters()).device
    handles = [layers[name].register_forward_pre_hook(sums.hear) for name, sums in watched.items()]
    total, predictions = None, []
    try:
        parent.module.to(device)
        for images in batches:
            logits = parent.module(parent.preprocess(images.to(device))).double()
            summed = logits.softmax(1).sum(0)
            total = summed if total is None else total + summed
            predictions.append(logits.argmax(1).cpu())
    finally:
        for handle in handles:
            handle.remove()
        parent.module.to(home)
    assert total is not None, "a set of proxies has at least one image"
    return Sums(parent.name, tuple(watched.values()), total, torch.cat(predictions))


def agreement(seen: Sequence[Observation]) -> float:
    """Share of the images on which all parents predict the same class."""
    same = torch.stack([one.predictions == seen[0].predictions for one in seen[1:]]).all(0)
    return float(same.double().mean())


class _NormSums:
    """Count, sum and sum of squares of a batch norm's input, per channel."""

    def __init__(self, name: str, layer: _BatchNorm) -> None:
        self.name = name
        self.layer = layer
        self.count = 0
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0

    def hear(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        value = inputs[0].double().transpose(0, 1).flatten(1)
        self.count += value.shape[1]
        self.first = self.first + value.sum(1)
        self.second = self.second + value.square().sum(1)

    def __add__(self, other: _NormSums) -> _NormSums:
        both = _NormSums(self.name, self.layer)
        both.count = self.count + other.count
        both.first, both.second = self.first + other.first, self.second + other.second
        return both

    def distance(self) -> NormDistance:
        mean, variance = self.layer.running_mean, self.layer.running_var
        assert isinstance(self.first, Tensor)
        assert isinstance(self.second, Tensor)
        assert mean is not None
        assert variance is not None
        found = (self.first / self.count).cpu()
        spread = (self.second.cpu() / self.count - found.square()).clamp_min(0) + self.layer.eps
        stored = variance.double().cpu() + self.layer.eps
        offset = ((found - mean.double().cpu()).square() / stored).mean().sqrt()
        return NormDistance(self.name, float(offset), float((spread / stored).log().abs().mean()))


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
