"""What a call of the library leaves as it was: random numbers, gradients, arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pydantic
import torch

from datafree.errors import UsageError
from datafree.progress import StageProgress, progress_on
from datafree.recipe.complaints import did_you_mean, known_keys
from datafree.spec import Spec
from datafree.stages.work import exact_arithmetic

Section = TypeVar("Section", bound=Spec)
Said = bool | StageProgress  # whether a call shows what it is doing, or where


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Random state as it was afterwards; inside, gradients can be taken whatever the caller switched off."""
    devices = [] if device.type == "cpu" else [device]
    with (
        torch.random.fork_rng(devices=devices),
        torch.inference_mode(False),
        torch.enable_grad(),
        exact_arithmetic(),
    ):
        yield


def shown(progress: Said) -> StageProgress:
    """True: a bar in a terminal, lines elsewhere, on standard error. False: nothing."""
    if isinstance(progress, StageProgress):
        return progress
    return progress_on() if progress else StageProgress()


def checked(section: type[Section], given: Any, what: str) -> Section:
    """`given`, a mapping or the section itself, as the recipe's section; what: the argument it came as.

    Raises UsageError in one sentence.
    """
    if isinstance(given, section):
        return given
    try:
        return section.model_validate(given)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"[{part!r}]" for part in first["loc"])
        if first["type"] == "extra_forbidden":
            said = f"unknown key{did_you_mean(str(first['loc'][-1]), known_keys(section, first['loc'][:-1]))}"
        else:
            said = str(first.get("ctx", {}).get("error") or first["msg"])
        raise UsageError(f"{what}{place}: {said}") from error
