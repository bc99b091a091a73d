"""Public images as proxies: a folder, arrays, or a dataset on disk, whatever `datafree.images` reads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from datafree.errors import UsageError
from datafree.images.files import BROKEN_SHARE, UNREADABLE, FileImages
from datafree.images.image_set import ImageSet, ImageSpec, content_hash, load_images
from datafree.images.preprocess import channel_note, match_channels
from datafree.proxy.source import SHARD, Request, Shard, Source, SourceSpec, register


@register
class ImagesSpec(SourceSpec):
    """Real images from somewhere else than the parents' training data. They are not augmented or repeated."""

    kind: Literal["images"] = "images"
    images: ImageSpec

    def bind(self, request: Request) -> Source:
        spec = self.images
        unequal = (spec.folder, spec.torchvision, spec.webdataset)  # files of any size; arrays have one
        if spec.size is None and any(place is not None for place in unequal):
            spec = spec.model_copy(update={"size": request.size})
        return _Images(load_images(spec, request.base, verify=False), request)


class _Images:
    """The images in a fixed seeded order, class by class in turn where there are labels, so every prefix is
    balanced.

    Files that cannot be decoded are passed over: shard i holds the readable images number 64 i to 64 i + 63.
    """

    def __init__(self, images: ImageSet, request: Request) -> None:
        self._images = images
        self._request = request
        self._order = stratified_order(images.labels, len(images), request.generator(0, "order"))
        self._readable: list[int] = []  # of the order, as far as it has been tried
        self._broken: list[str] = []
        self.limit: int | None = len(images)
        stored = images.images
        channels = stored.channels if isinstance(stored, FileImages) else stored.shape[1]
        converted = channel_note(channels, request.channels)
        self.notes: Sequence[str] = images.notes if converted is None else (*images.notes, converted)

    def key(self) -> Mapping[str, Any]:
        stored = self._images.images
        if isinstance(stored, FileImages):
            files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in stored.paths]
            content = hashlib.sha256(repr(files).encode()).hexdigest()
        else:
            content = hashlib.sha256(
                repr(stored.shape).encode() + np.ascontiguousarray(stored).tobytes()
            ).hexdigest()
        labels = self._images.labels
        return {
            "images": content,
            "labels": None if labels is None else hashlib.sha256(labels.tobytes()).hexdigest(),
        }

    def shard(self, index: int) -> Shard:
        while len(self._readable) < (index + 1) * SHARD and self._tried < len(self._order):
            self._try(int(self._order[self._tried]))
        chosen = self._readable[index * SHARD : (index + 1) * SHARD]
        if not chosen or len(self._broken) > BROKEN_SHARE * self._tried:
            named = "; ".join(self._broken[:5])
            raise UsageError(
                f"{len(self._broken)} of the {self._tried} images tried in {self._images.name} cannot be "
                f"read ({named}): fetch them again, remove them, or ask for fewer"
            )
        images = self._images.batch(chosen)
        facts: dict[str, Any] = {"hashes": [content_hash(image.numpy()) for image in images]}
        if self._broken:
            facts["notes"] = [f"skipped, cannot be read: {name}" for name in self._broken]
        return Shard(frame(match_channels(images, self._request.channels), self._request.size), facts)

    @property
    def _tried(self) -> int:
        return len(self._readable) + len(self._broken)

    def _try(self, position: int) -> None:
        stored = self._images.images
        if isinstance(stored, FileImages):
            try:
                stored[position]
            except UNREADABLE as error:
                self._broken.append(f"{stored.paths[position].name} ({error})")
                return
        self._readable.append(position)


def stratified_order(labels: np.ndarray | None, count: int, generator: torch.Generator) -> np.ndarray:
    """A permutation of `count` images, int64: shuffled, and dealt one class after the other while each has
    images left.
    """
    shuffled = torch.randperm(count, generator=generator).numpy()
    if labels is None:
        return shuffled
    rank = np.empty(count, dtype=np.int64)  # of each image within its class, in shuffled order
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        rank[members] = np.arange(len(members))
    turn = torch.randperm(int(labels.max()) + 1, generator=generator).numpy()
    return shuffled[np.lexsort((turn[labels[shuffled]], rank[shuffled]))]


def frame(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (n, c, h, w) -> (n, c, *size): resized, smoothly, until `size` is just covered, and cut around
    the centre.
    """
    height, width = images.shape[-2:]
    if (height, width) == size:
        return images
    scale = max(size[0] / height, size[1] / width)
    covered = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    resized = functional.interpolate(
        images.float(), covered, mode="bilinear", antialias=True, align_corners=False
    )
    top, left = (covered[0] - size[0]) // 2, (covered[1] - size[1]) // 2
    return resized[..., top : top + size[0], left : left + size[1]].round().clamp(0, 255).to(torch.uint8)
