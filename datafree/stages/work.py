"""What every stage of one run shares: the recipe, the device, the store of finished stages, the progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import pleas
from datafree.cache.limit import limit_bytes
from datafree.cache.store import DamagedStage, Stage, Store, cache_folder, check_writable, stage_key
from datafree.errors import UsageError
from datafree.evaluation.results import Point
from datafree.progress import StageProgress
from datafree.recipe.file import RecipeFile
from datafree.seeds import derive_seed


@dataclass(frozen=True)
class Work:
    """What every stage of one run shares. device: where networks run; the linear algebra stays on the CPU."""

    recipe: RecipeFile
    device: torch.device
    store: Store
    progress: StageProgress

    @property
    def seed(self) -> int:
        return self.recipe.recipe.seed

    @property
    def settings(self) -> pleas.MergeSettings:
        recipe = self.recipe.recipe
        return recipe.merge.settings(recipe.labels, derive_seed(self.seed, "positions"))

    @property
    def points(self) -> tuple[Point, ...]:
        merge = self.recipe.recipe.merge
        if merge.budgets is not None:
            return tuple(Point("budget", value) for value in merge.budgets)
        return tuple(Point("apart", value) for value in merge.apart or ())

    def kept(self, stage: str, inputs: Mapping[str, Any]) -> Stage | None:
        """What an interrupted run left of a stage, None if nothing or nothing usable."""
        try:
            return self.store.read(stage, stage_key(stage, inputs))
        except DamagedStage as error:
            self.progress.note(f"{error}; the stage starts again")
            return None

    def keep(
        self, stage: str, inputs: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], value: Any
    ) -> None:
        """Keep the state of an unfinished stage, so that an interrupted run goes on from here."""
        self.store.write(stage, stage_key(stage, inputs), tensors, value)

    def forget(self, stage: str, inputs: Mapping[str, Any]) -> None:
        """Remove the state of a stage that is finished."""
        self.store.path(stage, stage_key(stage, inputs)).unlink(missing_ok=True)

    def finished(self, stage: str, inputs: Mapping[str, Any], make: Callable[[], Stage]) -> Stage:
        """The stage from the store, or made now and kept. A damaged one is named and made again."""
        key = stage_key(stage, inputs)
        try:
            found = self.store.read(stage, key)
        except DamagedStage as error:
            self.progress.note(f"{error}; it is computed again")
            found = None
        if found is not None:
            return found
        made = make()
        self.store.write(stage, key, made.tensors, made.value)
        return made


def begin(recipe: RecipeFile, device: str = "auto", progress: StageProgress | None = None) -> Work:
    """The start of a run of `recipe`; device: "auto", "cpu", "cuda" or "cuda:N"."""
    limit_bytes()  # a limit that is no number is found before any work, as is a cache that is of no use
    check_writable(cache_folder())
    return Work(recipe, choose_device(device), Store(cache_folder()), progress or StageProgress())


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; else "cpu", "cuda" or "cuda:N". Raises UsageError for what is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, colon, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not number.isdecimal())):
        raise UsageError(
            f"--device {name}: give auto, cpu, cuda, or one of several GPUs as cuda:0, cuda:1, ..."
        )
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(
            f"--device {name}: this PyTorch sees no CUDA device; use --device cpu, or install a CUDA "
            "build of torch"
        )
    count = torch.cuda.device_count()
    if colon and (len(number) > 4 or int(number) >= count):
        seen = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise UsageError(f"--device {name}: this PyTorch sees {seen}; use one of these, or --device cpu")
    return torch.device(name if not colon else f"cuda:{int(number)}")


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """The same numbers every time: deterministic convolutions and no TF32, which would cost digits of the
    moments.
    """
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
