"""Noise: the baseline every other source has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from datafree.proxy.source import SHARD, Request, Shard, Source, SourceSpec, register

_WARNING = (
    "noise excites few directions of a network's features, so least squares from it is poor: "
    "a baseline, not a source to merge from"
)


@register
class NoiseSpec(SourceSpec):
    """Independent pixels. gaussian: mean 0.5, standard deviation `scale`, clipped; uniform: on [0, 1]."""

    kind: Literal["noise"] = "noise"
    form: Literal["gaussian", "uniform"] = "gaussian"
    scale: float = 0.25

    def bind(self, request: Request) -> Source:
        return _Noise(self, request)


@dataclass(frozen=True)
class _Noise:
    spec: NoiseSpec
    request: Request
    limit: int | None = None

    @property
    def notes(self) -> Sequence[str]:
        return (_WARNING,)

    def key(self) -> Mapping[str, Any]:
        return {}

    def shard(self, index: int) -> Shard:
        generator = self.request.generator(index)
        shape = (SHARD, self.request.channels, *self.request.size)
        if self.spec.form == "uniform":
            return Shard(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8))
        drawn = torch.randn(shape, generator=generator) * self.spec.scale + 0.5
        return Shard((drawn.clamp(0, 1) * 255).round().to(torch.uint8))
