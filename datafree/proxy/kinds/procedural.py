"""Procedural images: a mix of the generators of `textures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor

from datafree.images.preprocess import match_channels
from datafree.proxy.kinds.textures import TEXTURES
from datafree.proxy.mixture import interleave
from datafree.proxy.source import SHARD, Request, Shard, Source, SourceSpec, register
from datafree.spec import Spec

_NOTE = (
    "procedural images are good for matching units but 20 to 40 points worse than photographs or "
    "inverted images for a ResNet-20's least squares"
)


class Mix(Spec):
    """The weight of each generator; only ratios matter. The defaults follow how well each served a
    ResNet-20 on its own.
    """

    fractals: float = pydantic.Field(default=0.45, ge=0)
    leaves: float = pydantic.Field(default=0.25, ge=0)
    network: float = pydantic.Field(default=0.10, ge=0)
    fbm: float = pydantic.Field(default=0.10, ge=0)
    warp: float = pydantic.Field(default=0.10, ge=0)
    spectrum: float = pydantic.Field(default=0.0, ge=0)

    @pydantic.model_validator(mode="after")
    def _something(self) -> Mix:
        if not any(self.weights().values()):
            raise ValueError("every generator of the mix has weight 0: give at least one a positive weight")
        return self

    def weights(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in TEXTURES}


@register
class ProceduralSpec(SourceSpec):
    """Dead leaves, fractals, clouds, random networks and warps, in the shares of `mix`, exact for every
    prefix.
    """

    kind: Literal["procedural"] = "procedural"
    mix: Mix = Mix()

    def bind(self, request: Request) -> Source:
        return _Procedural(self, request)


@dataclass(frozen=True)
class _Procedural:
    spec: ProceduralSpec
    request: Request
    limit: int | None = None

    @property
    def notes(self) -> Sequence[str]:
        return (_NOTE,)

    def key(self) -> Mapping[str, Any]:
        return {}

    def shard(self, index: int) -> Shard:
        pixels = paint(self.spec.mix, SHARD, self.request.size, self.request.generator(index))
        return Shard(match_channels((pixels * 255).round().to(torch.uint8), self.request.channels))


def paint(mix: Mix, count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """`count` images in the shares of `mix`, float32 (count, 3, *size) in [0, 1]."""
    weights = {name: weight for name, weight in mix.weights().items() if weight > 0}
    total = sum(weights.values())
    order = torch.from_numpy(interleave([weight / total for weight in weights.values()], count))
    images = torch.empty(count, 3, *size)
    for number, name in enumerate(weights):
        chosen = (order == number).nonzero().squeeze(1)
        if len(chosen):
            images[chosen] = TEXTURES[name](len(chosen), *size, generator)
    return images
