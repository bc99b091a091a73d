"""From the recipe's `proxy` section to the proxy images that all parents are shown."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

import numpy as np
import pydantic
import torch
from torch import Tensor

from datafree.errors import UsageError
from datafree.images.image_set import content_hash
from datafree.proxy.augment import augment_lightly
from datafree.proxy.mixture import interleave
from datafree.proxy.shards import SCHEMA, ShardFile, ShardFolder, digest, fingerprint
from datafree.proxy.source import SHARD, SOURCES, Request, Shard, Source, SourceSpec, kind_of
from datafree.seeds import derive_seed
from datafree.spec import Spec

if TYPE_CHECKING:
    from datafree.models.parent import Parent

Progress = Callable[[str, int, int], None]  # stage, done, total


if TYPE_CHECKING:
    AnySource = SourceSpec
else:  # the registered kinds, told apart by the key `kind`
    AnySource = Annotated[Union[tuple(SOURCES.values())], pydantic.Field(discriminator="kind")]  # noqa: UP007


class ProxySpec(Spec):
    """The recipe's `proxy` section: how many images, from which sources, in which shares.

    settle: fewer than `count` images are made where the parents' second moments settle before: where doubling the
            number of images moves no layer's covariance by more than this share of it
    """

    count: int = pydantic.Field(ge=1, le=10_000_000)
    settle: float | None = pydantic.Field(default=None, gt=0)
    sources: tuple[AnySource, ...] = pydantic.Field(min_length=1)

    @pydantic.model_validator(mode="after")
    def _mixture(self) -> ProxySpec:
        try:
            interleave([source.share for source in self.sources], 0)
        except UsageError as error:
            raise ValueError(str(error)) from error
        texts = [source.model_dump_json(exclude=set(source.irrelevant)) for source in self.sources]
        twice = next((text for text, uses in Counter(texts).items() if uses > 1), None)
        if twice is not None:
            raise ValueError(
                f"proxy.sources lists {twice} twice, which would give the same images twice: add its shares"
            )
        return self


@dataclass(frozen=True)
class SourceReport:
    """What one source gave, for the manifest and the report.

    seconds: what making the shards took, whenever that was
    made:    shards made by this call; the others were cached
    facts:   mean over shards of what the source measured, e.g. {"bn_loss": {"a": 0.04, "b": 0.05}}
    """

    kind: str
    count: int
    seconds: float
    shards: int
    made: int
    fingerprint: str
    folder: str
    spec: Mapping[str, Any]
    facts: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def seconds_per_1000(self) -> float:
        return 1000 * self.seconds / (self.shards * SHARD)


@dataclass(frozen=True)
class ProxySet:
    """uint8 images (n, channels, height, width), read shard by shard from the cache, never all in memory.

    order: int64 (count, 2), the source and the index in it of every image
    """

    size: tuple[int, int]
    channels: int
    order: np.ndarray
    shards: tuple[tuple[ShardFile, ...], ...]
    manifest: tuple[SourceReport, ...]
    _open: dict[int, tuple[int, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.order)

    @property
    def fingerprint(self) -> str:
        """sha256 over the shards' bytes and the order they are read in."""
        return digest(
            [
                [fingerprint(shards) for shards in self.shards],
                hashlib.sha256(self.order.tobytes()).hexdigest(),
            ]
        )

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(note for report in self.manifest for note in report.notes)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """The images at `indices`, uint8 (n, channels, height, width)."""
        images = torch.empty((len(indices), self.channels, *self.size), dtype=torch.uint8)
        for row, index in enumerate(indices):
            source, image = (int(value) for value in self.order[index])
            images[row] = self._shard(source, image // SHARD)[image % SHARD]
        return images

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """All images in order, `batch_size` at a time (the last batch may be smaller)."""
        for start in range(0, len(self), batch_size):
            yield self.batch(range(start, min(start + batch_size, len(self))))

    def prefix(self, count: int) -> ProxySet:
        """The first `count` images, which hold the sources in the same shares."""
        if not 1 <= count <= len(self):
            raise ValueError(f"a prefix has between 1 and {len(self)} images, not {count}")
        return ProxySet(self.size, self.channels, self.order[:count], self.shards, self.manifest)

    def source(self, number: int) -> ProxySet:
        """The images of one source only."""
        order = self.order[self.order[:, 0] == number]
        return ProxySet(self.size, self.channels, order, self.shards, self.manifest)

    @property
    def source_names(self) -> list[str]:
        """The source of every image, in order: its number and kind."""
        names = [f"{number + 1} {report.kind}" for number, report in enumerate(self.manifest)]
        return [names[number] for number in self.order[:, 0].tolist()]

    def hashes(self) -> list[str]:
        """Content hashes that give a proxy image away: as cached, and as it was before resizing."""
        listed = [content_hash(image.numpy()) for batch in self.batches(SHARD) for image in batch]
        for source, image in self.order.tolist():
            before = self.shards[source][image // SHARD].facts.get("hashes")
            if before is not None:
                listed.append(before[image % SHARD])
        return listed

    def _shard(self, source: int, number: int) -> Tensor:
        held = self._open.get(source)
        if held is None or held[0] != number:
            held = (number, self.shards[source][number].read())
            self._open[source] = held  # one shard of each source: reading in order opens each file once
        return held[1]


def check_proxies(
    spec: ProxySpec, parents: Sequence[Parent], seed: int, base: Path, device: str = "cpu"
) -> list[tuple[SourceSpec, Source, int]]:
    """Every source bound to the parents, with the number of images it will give; no image is made.

    Raises UsageError, within seconds, for whatever would stop `build_proxies`.
    """
    size, channels = common_input(parents)
    order = interleave([source.share for source in spec.sources], spec.count)
    bound = []
    for number, source_spec in enumerate(spec.sources):
        kind = kind_of(source_spec)
        request = Request(
            parents, size, channels, derive_seed(seed, "proxy", kind), base, torch.device(device)
        )
        source = source_spec.bind(request)
        count = int((order == number).sum())
        if source.limit is not None and count > source.limit:
            raise UsageError(
                f"proxy source {number + 1} ({kind}) has {source.limit} images, but {count} are asked of it "
                f"(count {spec.count} x share {source_spec.share:g}): lower proxy.count or its share, or "
                "add images"
            )
        bound.append((source_spec, source, count))
    return bound


def build_proxies(
    spec: ProxySpec,
    parents: Sequence[Parent],
    seed: int,
    cache: Path,
    base: Path,
    progress: Progress | None = None,
    device: str = "cpu",
) -> ProxySet:
    """Make, or find in `cache`, the images that `spec` asks for.

    base: folder that relative paths of the recipe start from
    progress: called with ("proxy", shards ready, shards)
    Raises UsageError for what the user can mend, RunError when the cache cannot be written.
    """
    bound = check_proxies(spec, parents, seed, base, device)
    total, ready = sum(-(-count // SHARD) for _, _, count in bound), 0
    made: list[tuple[tuple[ShardFile, ...], SourceReport]] = []
    for maker, (_, _, count) in zip(_makers(bound, parents, seed), bound, strict=True):

        def hear(done: int, before: int = ready) -> None:
            if progress is not None:
                progress("proxy", before + done, total)

        made.append(maker.fill(cache, count, hear))
        ready += len(made[-1][0])
    return _together(spec, parents, made)


def find_proxies(
    spec: ProxySpec, parents: Sequence[Parent], seed: int, cache: Path, base: Path, device: str = "cpu"
) -> ProxySet | None:
    """What `build_proxies` would give, where all of it is in `cache`; None where an image would have to be made."""
    bound = check_proxies(spec, parents, seed, base, device)
    makers = _makers(bound, parents, seed)
    found = [maker.found(cache, count) for maker, (_, _, count) in zip(makers, bound, strict=True)]
    whole = [one for one in found if one is not None]
    return _together(spec, parents, whole) if len(whole) == len(found) else None


def _makers(
    bound: Sequence[tuple[SourceSpec, Source, int]], parents: Sequence[Parent], seed: int
) -> list[_Maker]:
    size, channels = common_input(parents)
    return [
        _Maker(spec, source, derive_seed(seed, "proxy", kind_of(spec)), size, channels)
        for spec, source, _ in bound
    ]


def _together(
    spec: ProxySpec,
    parents: Sequence[Parent],
    made: Sequence[tuple[tuple[ShardFile, ...], SourceReport]],
) -> ProxySet:
    """The images of all sources in the order of the mixture."""
    size, channels = common_input(parents)
    chosen = interleave([source.share for source in spec.sources], spec.count)
    within = np.zeros_like(chosen)
    for number in range(len(made)):
        within[chosen == number] = np.arange(int((chosen == number).sum()))
    shards, reports = tuple(files for files, _ in made), tuple(report for _, report in made)
    return ProxySet(size, channels, np.stack([chosen, within], axis=1), shards, reports)


@dataclass(frozen=True)
class _Maker:
    """One source on its way into the cache."""

    spec: SourceSpec
    source: Source
    seed: int
    size: tuple[int, int]
    channels: int
    made: list[int] = field(default_factory=list)

    def __call__(self, index: int) -> Shard:
        self.made.append(index)
        shard = self.source.shard(index)
        if self.spec.augment == "none":
            return shard
        return replace(
            shard, images=augment_lightly(shard.images, derive_seed(self.seed, "augment", str(index)))
        )

    def fill(
        self, cache: Path, count: int, hear: Callable[[int], None]
    ) -> tuple[tuple[ShardFile, ...], SourceReport]:
        files, notes = self._folder(cache).fill(count, self, hear)
        return tuple(files), self._report(cache, count, files, notes)

    def found(self, cache: Path, count: int) -> tuple[tuple[ShardFile, ...], SourceReport] | None:
        """The same where nothing has to be made; None otherwise."""
        files = self._folder(cache).found(count)
        return None if files is None else (tuple(files), self._report(cache, count, files, []))

    def _folder(self, cache: Path) -> ShardFolder:
        key = {
            "schema": SCHEMA,
            "version": self.spec.version,
            "section": self.spec.meaning(),
            "seed": self.seed,
            "size": list(self.size),
            "channels": self.channels,
            "depends": dict(self.source.key()),
        }
        return ShardFolder(cache, kind_of(self.spec), key)

    def _report(
        self, cache: Path, count: int, files: Sequence[ShardFile], notes: Sequence[str]
    ) -> SourceReport:
        said = (note for file in files for note in file.facts.get("notes", ()))
        facts = mean_facts([file.facts for file in files])
        return SourceReport(
            kind=kind_of(self.spec),
            count=count,
            seconds=sum(file.seconds for file in files),
            shards=len(files),
            made=len(self.made),
            fingerprint=fingerprint(files),
            folder=str(self._folder(cache).path),
            spec=self.spec.model_dump(mode="json"),
            facts=facts,
            notes=tuple(dict.fromkeys((*self.source.notes, *notes, *said, *self.spec.verdict(facts)))),
        )


def common_input(parents: Sequence[Parent]) -> tuple[tuple[int, int], int]:
    """((height, width), channels) that all parents take.

    Raises UsageError when they differ: proxies are made once and shown to every parent in the same pixels.
    """
    sizes = {(tuple(parent.preprocess.size), parent.preprocess.channels) for parent in parents}
    if len(sizes) != 1:
        colour = {1: "grey", 3: "RGB"}
        each = ", ".join(
            f"{parent.name} takes {parent.preprocess.size[0]}x{parent.preprocess.size[1]} "
            f"{colour.get(parent.preprocess.channels, f'{parent.preprocess.channels}-channel')}"
            for parent in parents
        )
        raise UsageError(
            f"the parents take different images ({each}), but proxies are made once and shown to both in "
            "the same pixels: give both the same preprocess.size and the same number of channels"
        )
    (size, channels) = sizes.pop()
    return (size[0], size[1]), channels


def mean_facts(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean over shards of every number in `facts`, nested mappings likewise; lists and texts are left out."""
    merged: dict[str, Any] = {}
    for name in facts[0] if facts else ():
        values = [fact[name] for fact in facts if name in fact]
        if all(isinstance(value, Mapping) for value in values):
            merged[name] = mean_facts(values)
        elif all(isinstance(value, int | float) for value in values):
            merged[name] = sum(values) / len(values)
    return merged
