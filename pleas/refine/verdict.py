"""Whether refining helped: a paired comparison on held-out images, image by image.

Every held-out image is answered by the network before and after, so what differs between images cancels. A mean is
trusted as far as two of its standard errors: a change within them is chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pleas.refine.distil import TINY, Closeness

ERRORS = 2.0  # standard errors either side of a mean
MIN_HELD_OUT = 64  # images, below which nothing is decided
ENOUGH = 128  # held out where that is a quarter of the images at most
MIN_SOURCE = 32  # held-out images of one source that have a say of their own


@dataclass(frozen=True)
class Look:
    """One network on the held-out images.

    losses: (N,) float64, whose mean is closeness.loss
    agreed: (N,) float64, every image's part in closeness.mean_agreement, which is their mean
    """

    closeness: Closeness
    losses: Tensor
    agreed: Tensor


@dataclass(frozen=True)
class Change:
    """A mean over images, and how far chance alone may have moved it."""

    mean: float
    margin: float
    images: int

    @classmethod
    def of(cls, differences: Tensor) -> Change:
        """differences: (N,), one an image, two at least."""
        error = float(differences.std()) / len(differences) ** 0.5
        return cls(float(differences.mean()), ERRORS * error, len(differences))

    @property
    def gained(self) -> bool:
        """Above zero, by more than chance and rounding."""
        return self.mean > max(self.margin, TINY)

    @property
    def lost(self) -> bool:
        return self.mean < -self.margin - TINY


@dataclass(frozen=True)
class Verdict:
    """better: whether the second network is to be kept; why: in one sentence, with the numbers that decided."""

    better: bool
    why: str


def compare(start: Look, found: Look, sources: Sequence[str] | None = None) -> Verdict:
    """Whether `found` is closer to the parents than `start`, beyond chance.

    Its loss has to be lower on all images together and on those of every source that has MIN_SOURCE of them, and its
    agreement with the parents no lower.

    sources: of every held-out image
    """
    gain = Change.of(start.losses - found.losses)
    shift = Change.of(found.agreed - start.agreed)
    numbers = (
        f"on {gain.images} held-out images the loss goes from {start.closeness.loss:.3g} to {found.closeness.loss:.3g} "
        f"(down by {_told(gain)} an image), agreement with the parents "
        f"from {100 * start.closeness.mean_agreement:.1f} to {100 * found.closeness.mean_agreement:.1f} % "
        f"(by {_told(shift, 100)} points)"
    )
    if not gain.gained:
        return Verdict(False, f"the start is kept: {numbers}, no gain beyond chance")
    for source, part in _parts(sources).items():
        own = Change.of((start.losses - found.losses)[part])
        if not own.gained:
            return Verdict(
                False,
                f"the start is kept: {numbers}, but on the {own.images} of {source} the loss goes down by "
                f"{_told(own)}, no gain beyond chance",
            )
    if shift.lost:
        return Verdict(False, f"the start is kept: {numbers}, so agreement is lost")
    return Verdict(True, f"the refined network is kept: {numbers}")


def _told(change: Change, scale: float = 1.0) -> str:
    return f"{scale * change.mean:.2g} ± {scale * change.margin:.2g}"


def _parts(sources: Sequence[str] | None) -> dict[str, Tensor]:
    """Source -> places of its images, where there are several sources and it has enough."""
    names = sorted(set(sources or ()))
    places = {name: [i for i, source in enumerate(sources or ()) if source == name] for name in names}
    enough = {name: torch.tensor(own) for name, own in places.items() if len(own) >= MIN_SOURCE}
    return enough if len(names) > 1 else {}


def share_held_out(count: int, share: float) -> float:
    """The share of `count` images to hold out: more than asked for where that would be too few to decide on."""
    wanted = max(MIN_HELD_OUT, min(ENOUGH, count // 4))
    return max(share, wanted / count)
