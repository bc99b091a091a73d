"""Every choice of a merge that changes its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pleas.errors import InputError

Matching = Literal["activation", "weight"]
Allocation = Literal["error", "uniform", "zip", "early"]
Heads = Literal["shared", "separate", "union"]
Targets = Literal["mean", "own", "auto"]
CANDIDATES = (0.0, 0.7, 1.0)  # what `propagate = "auto"` tries


@dataclass(frozen=True)
class MergeSettings:
    """Settings of a merge; the defaults are the ones the README's numbers were measured with.

    matching:   "activation" (correlation of units on the proxies) or "weight" (Git Re-Basin coordinate
        descent, no images)
    allocation: how a budget is spread over the classes: "error" (where fusing costs most per multiply-add),
                "uniform" (the same share everywhere), "zip" (late layers apart first, as ZipIt! and PLeaS) or
                "early" (early layers apart first)
    heads:      "shared" (one head, the mean of the parents' logits), "separate" (one head per parent) or "union" (one
                head; an output is the mean over the parents that know it)
    outputs:    with "union", for each parent the merged output that each of its outputs is
    propagate:  of a layer's inputs, how much is what the merged network itself gives there, the rest being the mean of
                the parents' inputs: 0 solves every layer by itself, 1 only on what it will meet; "auto" tries
                CANDIDATES and keeps the one whose logits are nearest to the parents' on held-out images
    targets:    what every layer is to give for an image: "mean", the parents' mean; "own", mostly what the parent gives
                whose batch norms the image fits best; "auto", that only where parents contradict each other, or,
                with a head each, where the images of one are foreign to another
    ridge:      relative to the mean diagonal of the Gram matrix, towards the partial-merge weights
    head_ridge: the same for the layers whose outputs are the network's
    rows:       rows collected per unknown of a layer, over all images; a seeded choice of positions (decision 0002)
    positions:  positions of one image at most, however few the images
    min_rows:   rows per unknown below which a layer is refused; under 1 the ridge fills the rest
    holdout:    share of the images that no layer is solved on: they tell how good the merged network is
    """

    matching: Matching = "activation"
    allocation: Allocation = "error"
    heads: Heads = "shared"
    propagate: float | Literal["auto"] = "auto"
    targets: Targets = "auto"
    ridge: float = 1e-2
    head_ridge: float = 0.1
    rows: int = 16
    positions: int = 64
    min_rows: float = 0.25
    holdout: float = 0.125
    seed: int = 0
    outputs: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        choices_of = {"matching": Matching, "allocation": Allocation, "heads": Heads, "targets": Targets}
        for name, kind in choices_of.items():
            if getattr(self, name) not in get_args(kind):
                choices = ", ".join(get_args(kind))
                raise InputError(f"{name} = {getattr(self, name)!r}: must be one of {choices}")
        if self.outputs is not None:
            check_places(self.heads, self.outputs)
        if self.propagate != "auto" and not (
            isinstance(self.propagate, int | float) and 0 <= self.propagate <= 1
        ):
            raise InputError(
                f'propagate = {self.propagate!r}: must be "auto" or a number from 0 (every layer solved by itself) to '
                "1 (on what the merged network gives)"
            )
        for name, usual in (("ridge", "1e-2"), ("head_ridge", "0.1")):
            if not getattr(self, name) > 0:
                raise InputError(
                    f"{name} = {getattr(self, name)}: must be > 0, for example {usual} (relative to the mean diagonal)"
                )
        for name in ("rows", "positions"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"{name} = {getattr(self, name)}: must be at least 1 (the defaults are 16 and 64)"
                )
        if not 0 < self.holdout <= 0.5:
            raise InputError(
                f"holdout = {self.holdout}: must be above 0 and at most 0.5, a share of the images"
            )

    @property
    def candidates(self) -> tuple[float, ...]:
        """The values of `propagate` that are tried."""
        return CANDIDATES if self.propagate == "auto" else (float(self.propagate),)


def check_places(heads: str, places: Sequence[Sequence[int]]) -> None:
    """Raise InputError unless `places`, per parent the merged output that each of its outputs is, is a union."""
    if heads != "union":
        raise InputError(
            f"outputs says which outputs of the parents are one, and heads = {heads!r}: say heads='union', or leave "
            "outputs out"
        )
    for number, own in enumerate(places):
        if len(set(own)) < len(own):
            twice = next(place for place in own if list(own).count(place) > 1)
            raise InputError(
                f"outputs[{number}] names the merged output {twice} twice: give every output its own"
            )
    named = {place for own in places for place in own}
    if named != set(range(len(named))):
        raise InputError(
            f"outputs name {len(named)} merged outputs, {min(named, default=0)} to {max(named, default=0)}: number "
            "them from 0 on and leave none out"
        )
