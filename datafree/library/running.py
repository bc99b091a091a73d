"""`datafree.run`: a recipe from wherever it is, a file or a dictionary, to a folder of artefacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datafree import pipeline
from datafree.errors import UsageError
from datafree.library.quiet import Said, shown
from datafree.recipe import yaml_source
from datafree.recipe.file import RecipeFile, load_recipe, parse_recipe
from datafree.recipe.schema import Recipe

if TYPE_CHECKING:
    from datafree.pipeline import Outcome

FROM_A_DICT = "recipe"  # what errors call a recipe that is in no file


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe | RecipeFile,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    device: str = "auto",
    overwrite: bool = False,
    export: bool = False,
    progress: Said = False,
) -> Outcome:
    """Run a recipe, as `datafree merge` does, and write the folder `out`, whole or not at all.

    recipe:    the path of a YAML file, or the recipe itself: a mapping, a `Recipe`, or what `load_recipe` gave.
               Relative paths start from the file's folder, and from the working directory where there is no file
    out:       the folder; the recipe's name by default
    overrides: as `--set` takes them: ["proxy.count=256"]
    device:    "auto", "cpu", "cuda" or "cuda:N"
    overwrite: replace a folder that datafree wrote before
    export:    also write a torch.export program and ONNX
    Returns the folders and the results, with `.to_frame()` and `.plot()`. Raises UsageError, with file, line and
    column, for what the caller can mend, RunError for a run that failed.

    >>> outcome = datafree.run("tiny.yaml", "out", overrides=["proxy.count=64"])
    >>> outcome
    Outcome(out: 2 networks, budget 1 and budget 1.4)
    """
    checked = as_recipe_file(recipe, overrides)
    return pipeline.run(
        checked,
        checked.recipe.name if out is None else out,
        device=device,
        overwrite=overwrite,
        export=export,
        progress=shown(progress),
    )


def as_recipe_file(recipe: Any, overrides: Sequence[str] = ()) -> RecipeFile:
    """The checked recipe. Raises UsageError, in one sentence a mistake."""
    if isinstance(recipe, RecipeFile):
        if overrides:
            raise UsageError(
                "overrides go to load_recipe where a RecipeFile is given: load_recipe(path, overrides)"
            )
        return recipe
    if isinstance(recipe, str | Path):
        return load_recipe(recipe, overrides)
    if isinstance(recipe, Recipe):
        recipe = recipe.model_dump(mode="json", exclude_none=True)
    if not isinstance(recipe, Mapping):
        raise UsageError(
            f"recipe is a {type(recipe).__name__}: give the path of a .yaml file, a dictionary, or a Recipe"
        )
    return parse_recipe(yaml_source.dump(_plain(recipe, ())), FROM_A_DICT, overrides)


def _plain(value: Any, place: tuple[str, ...]) -> Any:
    """What YAML can say of it: paths are texts, tuples lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, (*place, str(key))) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, (*place, str(i))) for i, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UsageError(
        f"recipe: {'.'.join(place)} is a {type(value).__name__}: a recipe holds texts, numbers, lists and mappings; "
        "networks and images in memory go to datafree.merge"
    )
