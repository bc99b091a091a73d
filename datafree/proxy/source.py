"""What a proxy source is, and the registry of the kinds there are.

A source is a pure function: (its section of the recipe, seed, shard number) -> uint8 images. Images come in
fixed shards of `SHARD`, and an image depends on nothing outside its shard: not on how many images are asked
for, not on the batch size of whoever reads them, not on the shards made before. A recipe's section
(`SourceSpec`) holds only what the user wrote; `bind` opens files and checks the parents, in seconds, and
gives the `Source` that makes shards.

A new kind is one file with one class under `@register`, imported in `datafree/proxy/__init__.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

import pydantic
import torch
from torch import Tensor

from datafree.seeds import derive_seed
from datafree.spec import Spec

if TYPE_CHECKING:
    from datafree.models.parent import Parent

SHARD = 64  # images a shard; part of what an image is, so part of every cache key


@dataclass(frozen=True)
class Request:
    """What every source of one proxy set has in common.

    parents: the networks the proxies are for    size: (height, width) in pixels    channels: 1 or 3
    seed: of this source; shard seeds derive from it    base: folder that relative paths start from
    """

    parents: Sequence[Parent]
    size: tuple[int, int]
    channels: int
    seed: int
    base: Path
    device: torch.device

    def generator(self, shard: int, *names: str) -> torch.Generator:
        """For one shard (and, with names, one purpose in it); on the CPU, so every device draws alike."""
        seed = derive_seed(self.seed, "shard", str(shard), *names)
        return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Shard:
    """Some images of a source.

    images: uint8 (n, channels, height, width); n = SHARD but for the last shard of a finite source
    facts:  JSON-able; "notes" (sentences for the report) and "hashes" (of files as read) have a meaning
    """

    images: Tensor
    facts: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """A kind bound to a request, ready to make shards."""

    @property
    def limit(self) -> int | None:
        """How many images there are, None when there is no end."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What a reader of the report should know, one sentence each."""
        ...

    def key(self) -> Mapping[str, Any]:
        """Everything JSON-able that pixels depend on besides the section, the seed, the size and the channels."""
        ...

    def shard(self, index: int) -> Shard: ...


class SourceSpec(Spec, ABC):
    """A section under `proxy.sources`. A kind adds `kind: Literal["its name"] = "its name"` and its keys.

    share:   of the images; over all sources they add up to 1
    augment: light: random crops, mirrors and recolours, once, before the cache
    """

    version: ClassVar[int] = 1  # raised whenever the same section would give other pixels
    irrelevant: ClassVar[frozenset[str]] = frozenset({"share"})  # keys that change no pixel
    later: ClassVar[frozenset[str]] = (
        frozenset()
    )  # keys added since: at their defaults no part of what an image is
    share: float = pydantic.Field(default=1.0, gt=0, le=1)
    augment: Literal["none", "light"] = "none"

    def meaning(self) -> dict[str, Any]:
        """The keys that decide pixels, JSON-able: part of the name under which shards are kept."""
        fields = type(self).model_fields
        silent = {key for key in self.later if getattr(self, key) == fields[key].default}
        return self.model_dump(mode="json", exclude=set(self.irrelevant) | silent)

    @abstractmethod
    def bind(self, request: Request) -> Source:
        """Open files, check parents and sizes; raises UsageError within seconds where the source cannot work."""

    def verdict(self, facts: Mapping[str, Any]) -> Sequence[str]:
        """Sentences for the report on what was made, from the shards' facts averaged: what to know and what to do."""
        return ()


SOURCES: dict[str, type[SourceSpec]] = {}

_Kind = TypeVar("_Kind", bound=type[SourceSpec])


def register(spec: _Kind) -> _Kind:
    """Class decorator: makes the kind known to recipes. A second class of one kind is a bug and raises ValueError."""
    kind = spec.model_fields["kind"].default
    if kind in SOURCES:
        raise ValueError(f"proxy source {kind!r} is registered twice: {SOURCES[kind]!r} and {spec!r}")
    SOURCES[kind] = spec
    return spec


def kind_of(spec: SourceSpec) -> str:
    return type(spec).model_fields["kind"].default
