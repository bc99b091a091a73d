"""From stored images to a network's input: channels, size, mean and standard deviation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor
from torch.nn import functional

from datafree.errors import UsageError
from datafree.spec import Spec

Interpolation = Literal["bilinear", "bicubic", "nearest"]

GREY_TO_RGB = "grey images are repeated over the three channels"
RGB_TO_GREY = "colour images become grey by the luma weights 0.299 R + 0.587 G + 0.114 B"
MOST_SIDE = 4096  # pixels of an input or an image: more than a network sees, and what memory has room for
_LUMA = (0.299, 0.587, 0.114)


class PreprocessSpec(Spec):
    """What a recipe may say of a parent's input; the model's own configuration gives the rest."""

    size: int | tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: Interpolation | None = None

    @pydantic.model_validator(mode="after")
    def _sensible(self) -> PreprocessSpec:
        sides = (self.size,) if isinstance(self.size, int) else self.size or ()
        if any(side < 1 for side in sides):
            raise ValueError(f"size is {self.size}: give the input's height and width in pixels, at least 1")
        if any(side > MOST_SIDE for side in sides):
            raise ValueError(f"size is {self.size}: at most {MOST_SIDE:,} pixels a side are taken")
        if self.mean is not None and len(self.mean) not in (1, 3):
            raise ValueError(f"mean has {len(self.mean)} numbers: give one for grey input or three for RGB")
        if self.std is not None and any(value <= 0 for value in self.std):
            raise ValueError(
                f"std is {list(self.std)}: every number must be above 0 (pixels count from 0 to 1)"
            )
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError(
                f"mean has {len(self.mean)} numbers and std {len(self.std)}: give as many of each"
            )
        return self


@dataclass(frozen=True)
class Preprocess:
    """How uint8 images become one network's input; `mean` and `std`, per channel, for pixels from 0 to 1."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bilinear"

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one input."""
        return (self.channels, *self.size)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> float32 (N, channels, *size) on the same device, normalised.

        Resized (anti-aliased) only when the size differs; channels follow `match_channels`. Raises UsageError
        for images that are not uint8 (N, 1 or 3, H, W).
        """
        if not isinstance(images, Tensor):
            raise UsageError(
                f"images are a {type(images).__name__}: a uint8 tensor (N, C, H, W) is needed; of a PIL image it is "
                "torchvision.transforms.functional.pil_to_tensor(image)[None]"
            )
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise UsageError(
                f"images are {images.dtype} {tuple(images.shape)}: uint8 of shape (N, C, H, W) is needed, "
                "values from 0 to 255"
            )
        pixels = match_channels(images, self.channels).float() / 255
        if tuple(pixels.shape[-2:]) != self.size:
            smooth = self.interpolation != "nearest"  # anti-aliasing is not defined for nearest
            pixels = functional.interpolate(
                pixels, self.size, mode=self.interpolation, antialias=smooth
            ).clamp(0, 1)
        mean = torch.tensor(self.mean, device=pixels.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(-1, 1, 1)
        return (pixels - mean) / std

    @classmethod
    def of(cls, values: Mapping[str, Any], what: str = "preprocess") -> Preprocess:
        """From size, mean, std and maybe interpolation, as a recipe spells them; what: the argument they came as.

        Raises UsageError, in one sentence, for a value that is none and for one that is missing.
        """
        try:
            said = PreprocessSpec.model_validate(dict(values))
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = "".join(f"[{part!r}]" for part in first["loc"])
            why = str(first.get("ctx", {}).get("error") or first["msg"])
            if first["type"] == "extra_forbidden":
                why = f"unknown key; the keys are {', '.join(PreprocessSpec.model_fields)}"
            raise UsageError(f"{what}{place}: {why}") from error
        if said.size is None or said.mean is None or said.std is None:
            missing = [key for key in ("size", "mean", "std") if getattr(said, key) is None]
            raise UsageError(f"{what} does not say {' and '.join(missing)}: give size, mean and std")
        size = (said.size, said.size) if isinstance(said.size, int) else said.size
        return cls(size, said.mean, said.std, said.interpolation or "bilinear")

    def to_dict(self) -> dict[str, object]:
        """Plain values, as a recipe spells them."""
        return {
            "size": list(self.size),
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
        }


def match_channels(images: Tensor, channels: int) -> Tensor:
    """uint8 (N, 1 or 3, H, W) -> (N, channels, H, W), by the rules GREY_TO_RGB and RGB_TO_GREY."""
    have = images.shape[1]
    if have == channels:
        return images
    if (have, channels) == (1, 3):
        return images.expand(-1, 3, -1, -1)
    if (have, channels) == (3, 1):
        luma = torch.tensor(_LUMA, device=images.device).view(1, 3, 1, 1)
        return (images.float() * luma).sum(1, keepdim=True).round().to(torch.uint8)
    raise UsageError(
        f"images have {have} channels and the model wants {channels}: only grey (1) and RGB (3) are converted"
    )


def channel_note(have: int, want: int) -> str | None:
    """What a report says when images with `have` channels feed a model that wants `want`; None when equal."""
    return {(1, 3): GREY_TO_RGB, (3, 1): RGB_TO_GREY}.get((have, want))
