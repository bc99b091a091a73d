"""Every choice of a merge that changes its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pleas.errors import InputError


@dataclass(frozen=True)
class MergeSettings:
    """Settings of a merge; the defaults are the ones the README's numbers were measured with.

    matching:   "activation" (correlation of units on the proxies) or "weight" (Git Re-Basin coordinate
        descent, no images)
    allocation: how a budget is spread over the classes: "error" (where fusing costs most per multiply-add),
                "uniform" (the same share everywhere) or "zip" (late layers apart first, as ZipIt! and PLeaS)
    heads:      "shared" (one head, the mean of the parents' logits) or "separate" (one head per parent)
    ridge:      relative to the mean diagonal of the Gram matrix, towards the partial-merge weights
    rows:       rows collected per unknown of a layer, over all images; a seeded choice of positions (design 3)
    positions:  positions of one image at most, however few the images
    min_rows:   rows per unknown below which a layer is refused; under 1 the ridge fills the rest
    """

    matching: Literal["activation", "weight"] = "activation"
    allocation: Literal["error", "uniform", "zip"] = "error"
    heads: Literal["shared", "separate"] = "shared"
    ridge: float = 1e-3
    rows: int = 16
    positions: int = 64
    min_rows: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise InputError(
                f"ridge = {self.ridge}: must be > 0, for example 1e-3 (relative to the mean diagonal)"
            )
        for name in ("rows", "positions"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"{name} = {getattr(self, name)}: must be at least 1 (the defaults are 16 and 64)"
                )
