"""Merge trained vision networks into one without their training data.

    merged = datafree.merge([a, b], budgets=[1, 1.25], preprocess={...})   # from images inverted from the networks
    scores = datafree.evaluate(merged, loader)         # beside the parents and their ensemble
    merged[1.25].module                                # an ordinary torch.nn.Module
    datafree.save(merged[1.25], "out")                 # an artefact folder that explains itself and reloads
    datafree.run("recipe.yaml", "out")                 # the same from a recipe, with a report

`pleas` is the mathematics behind it. The names below are imported on first use, so that `import datafree` (and the
command line) does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datafree.artefact.load import Artefact, load
    from datafree.artefact.save import save
    from datafree.errors import DatafreeError, RunError, UsageError
    from datafree.images.preprocess import Preprocess
    from datafree.library.images import Images
    from datafree.library.judging import Diagnosed, Evaluated, diagnose, evaluate
    from datafree.library.merging import MergedNetworks, merge, refine
    from datafree.library.proxies import invert
    from datafree.library.running import run
    from datafree.pipeline import Outcome
    from datafree.recipe.file import RecipeFile, load_recipe
    from datafree.recipe.schema import Recipe

    __version__: str

_HOME = {
    "Artefact": "artefact.load",
    "DatafreeError": "errors",
    "Diagnosed": "library.judging",
    "Evaluated": "library.judging",
    "Images": "library.images",
    "MergedNetworks": "library.merging",
    "Outcome": "pipeline",
    "Preprocess": "images.preprocess",
    "Recipe": "recipe.schema",
    "RecipeFile": "recipe.file",
    "RunError": "errors",
    "UsageError": "errors",
    "diagnose": "library.judging",
    "evaluate": "library.judging",
    "invert": "library.proxies",
    "load": "artefact.load",
    "load_recipe": "recipe.file",
    "merge": "library.merging",
    "refine": "library.merging",
    "run": "library.running",
    "save": "artefact.save",
}

__all__ = [
    "Artefact",
    "DatafreeError",
    "Diagnosed",
    "Evaluated",
    "Images",
    "MergedNetworks",
    "Outcome",
    "Preprocess",
    "Recipe",
    "RecipeFile",
    "RunError",
    "UsageError",
    "__version__",
    "diagnose",
    "evaluate",
    "invert",
    "load",
    "load_recipe",
    "merge",
    "refine",
    "run",
    "save",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("datafree")
    if name not in _HOME:
        raise AttributeError(f"module 'datafree' has no attribute {name!r}")
    return getattr(importlib.import_module(f"datafree.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
