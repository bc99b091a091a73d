"""What the merged network is shown: batch n of a run is a pure function of (seed, n).

No generator lives across steps, so a run goes on after an interruption exactly as if there had been none, and
a batch that comes round again is the same batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Augment = Callable[[Tensor, torch.Generator], Tensor]  # uint8 (N, C, H, W) -> uint8 of the same shape


def generator_for(seed: int, *purpose: str | int) -> torch.Generator:
    """A generator of its own for every purpose, the same in every process."""
    text = "\x00".join(map(str, (seed, "refine", *purpose)))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big"))


class Batches:
    """Augmented batches of `images`, uint8 (N, C, H, W); every image once before any comes again.

    views: different batches before they come round, 0: no limit      mix: share of a batch that is blended
    """

    def __init__(
        self, images: Tensor, size: int, seed: int, augment: Augment | None, views: int = 0, mix: float = 0.0
    ) -> None:
        self._images, self._size, self._seed = images, size, seed
        self._augment, self._views, self._mix = augment, views, mix
        self._orders: dict[tuple[str, int], Tensor] = {}

    def joined_by(self, images: Tensor, renewal: int) -> Batches:
        """Other batches, of these images and the new ones. renewal: which it is, from 1 on."""
        seed = generator_for(self._seed, "renewal", renewal).initial_seed()
        return Batches(
            torch.cat([self._images, images]), self._size, seed, self._augment, self._views, self._mix
        )

    @property
    def shape(self) -> torch.Size:
        """Of one image."""
        return self._images.shape[1:]

    def number(self, step: int) -> int:
        """Which batch belongs to `step`; of a limited number of views, each comes once before any again."""
        if not self._views:
            return step
        lap, place = divmod(step, self._views)
        return int(self._order("lap", lap, self._views)[place])

    def __call__(self, number: int) -> Tensor:
        places = torch.arange(number * self._size, (number + 1) * self._size)
        laps, offsets = places // len(self._images), places % len(self._images)
        chosen = torch.empty_like(places)
        for lap in laps.unique().tolist():
            here = laps == lap
            chosen[here] = self._order("images", lap, len(self._images))[offsets[here]]
        images = self._images[chosen]
        generator = generator_for(self._seed, "view", number)
        if self._augment is not None:
            images = self._augment(images, generator)
        return blend(images, self._mix, generator)

    def _order(self, kind: str, lap: int, count: int) -> Tensor:
        if (kind, lap) not in self._orders:
            if len(self._orders) > 16:
                self._orders.clear()
            self._orders[kind, lap] = torch.randperm(count, generator=generator_for(self._seed, kind, lap))
        return self._orders[kind, lap]


def split_off(
    count: int,
    share: float,
    seed: int,
    sources: Sequence[str] | None = None,
    unused: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Indices to train on and indices held out, both ascending; a seeded choice.

    sources: of every image; the same share of each is held out
    unused:  bool (count,), images that nothing learnt from so far: these are held out before any other
    """
    order = torch.randperm(count, generator=generator_for(seed, "held out"))
    if unused is not None:
        order = torch.cat([order[unused[order]], order[~unused[order]]])
    parts = [order]
    if sources is not None:
        parts = [order[[sources[i] == name for i in order.tolist()]] for name in sorted(set(sources))]
    cuts = [max(1, round(share * len(part))) for part in parts]
    train = torch.cat([part[cut:] for part, cut in zip(parts, cuts, strict=True)])
    held = torch.cat([part[:cut] for part, cut in zip(parts, cuts, strict=True)])
    return train.sort().values, held.sort().values


def shift_and_flip(
    images: Tensor, generator: torch.Generator, *, shift: float = 0.125, flip: bool = True
) -> Tensor:
    """Every image moved by up to `shift` of its sides, edges reflected; half are also mirrored."""
    count, channels, height, width = images.shape
    down, across = _offsets(count, height, shift, generator), _offsets(count, width, shift, generator)
    rows, columns = _reflected(down, height), _reflected(across, width)
    if flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    image = torch.arange(count)[:, None, None, None]
    channel = torch.arange(channels)[None, :, None, None]
    return images[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def blend(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A copy in which the first `share` of the images are each blended with another one, in random proportions.

    This is MixUp (arXiv 1710.09412) without labels: the parents say what the blend is.
    """
    count = round(share * len(images))
    if not count:
        return images
    partners = images[torch.randperm(len(images), generator=generator)[:count]].float()
    part = torch.rand(count, 1, 1, 1, generator=generator)
    blended = (part * images[:count] + (1 - part) * partners).round().to(torch.uint8)
    return torch.cat([blended, images[count:]])


def _offsets(count: int, side: int, shift: float, generator: torch.Generator) -> Tensor:
    reach = min(round(shift * side), side - 1)
    return torch.randint(-reach, reach + 1, (count,), generator=generator)


def _reflected(offsets: Tensor, side: int) -> Tensor:
    """Per image, which of `side` lines is seen in each place: (N, side)."""
    places = (offsets[:, None] + torch.arange(side)).abs()
    return torch.where(places >= side, 2 * (side - 1) - places, places)
