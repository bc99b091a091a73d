"""Which positions of a map are looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from pleas.settings import MergeSettings


class PositionSampler:
    """A fixed, seeded choice of positions per image: neighbouring positions of a map are nearly copies of one
    another, and a problem needs a few rows per unknown, not thousands (decision 0002).

    The choice depends on (seed, size of the map, index of the image) only, so shards and batch sizes do not change it.
    images: how many there are in all shards together; None where nobody knows: `positions` are taken of each.
    """

    PERIOD = 256  # images after which the choices repeat
    LEAST = 16  # positions of every image, also where there are few unknowns

    def __init__(self, settings: MergeSettings, images: int | None) -> None:
        self.settings, self.images = settings, images
        self._tables: dict[tuple[int, int], Tensor] = {}

    def limit(self, unknowns: int) -> int:
        """Positions per image that give `rows` rows per unknown over all images, `positions` at most."""
        if self.images is None:
            return self.settings.positions
        wanted = -(-self.settings.rows * unknowns // self.images)
        return min(self.settings.positions, max(self.LEAST, wanted))

    def __call__(
        self, total: int, unknowns: int, entries: int, images: int, first_image: int
    ) -> Tensor | None:
        """(entries, P) of `total` positions, or None where there are no more than wanted.

        entries: how many maps there are: as many as images, or a multiple where windows of one image stand in the
            batch dimension
        images, first_image: how many images the batch holds, and the index of its first
        """
        parts = max(1, entries // images)
        limit = -(-self.limit(unknowns) // parts)
        if total <= limit:
            return None
        if (total, limit) not in self._tables:
            generator = torch.Generator().manual_seed(self.settings.seed)
            order = torch.rand((self.PERIOD, total), generator=generator).argsort(1)
            self._tables[total, limit] = order[:, :limit].sort(1).values
        first = first_image * parts
        return self._tables[total, limit][torch.arange(first, first + entries) % self.PERIOD]
