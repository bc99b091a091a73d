"""A recipe's file: read, checked section by section and between sections, and written again with every default."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

import pleas
from datafree.errors import UsageError
from datafree.evaluation.evaluate import BOTH
from datafree.recipe import yaml_source
from datafree.recipe.complaints import did_you_mean, located
from datafree.recipe.schema import Recipe
from datafree.recipe.yaml_source import Key, Source


@dataclass(frozen=True)
class RecipeFile:
    """A checked recipe and the text it came from.

    path: the file (or a name for text that came from elsewhere)
    base: the folder where relative paths start
    """

    recipe: Recipe
    path: Path
    base: Path
    source: Source

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process its text is enough; the classes of some sections are made on import and have no name."""
        return check_source, (self.source, self.path)

    def resolved(self, folder: Path) -> str:
        """The recipe with every default filled in, as YAML that can be run again from `folder`."""
        content = self.recipe.model_dump(mode="json", exclude_none=True)
        content["folder"] = os.path.relpath(self.base, folder)
        return yaml_source.dump({key: content[key] for key in ("name", "folder", *content) if key in content})

    def error(self, message: str, *key: str | int) -> UsageError:
        """`message` with the place of `key` before it."""
        return self.source.error(key, message)

    @contextmanager
    def at(self, *key: str | int) -> Iterator[None]:
        """Errors raised inside that are the caller's mistake get the place of `key` before their message."""
        try:
            yield
        except (UsageError, pleas.InputError) as error:
            inner = error.key if isinstance(error, UsageError) else ()
            raise self.error(str(error), *key, *inner) from error


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RecipeFile:
    """Read and check the recipe in file `path`, with `--set`-style `overrides` applied.

    Raises UsageError that lists every mistake, each with its place. Files the recipe names are not opened.
    """
    return parse_recipe(read_text(Path(path)), path, overrides)


def read_text(path: Path, what: str = "recipe") -> str:
    """The text of a YAML file, its lines ending in one character. Raises UsageError.

    what: the file is, in errors
    """
    try:
        with path.open("rb") as file:
            content = file.read(4 * yaml_source.MOST_TEXT + 1)  # a character is at most four bytes
    except FileNotFoundError as error:
        raise UsageError(
            f"{path}: no such {what}; give the path of a .yaml file{_yaml_nearby(path)}"
        ) from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > 4 * yaml_source.MOST_TEXT:
        raise UsageError(f"{path}:1:1: this is larger than any {what}; give the path of a .yaml file")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        place = yaml_source.locate(str(path), content[: error.start].decode())
        raise UsageError(
            f"{place}: not a text file (byte {error.start} is not UTF-8); a {what} is YAML"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_recipe(text: str, path: str | Path, overrides: Sequence[str] = ()) -> RecipeFile:
    """As `load_recipe`, from text; `path` names it in errors and its folder is where relative paths start."""
    return check_source(yaml_source.override(yaml_source.parse(text, str(path)), overrides), path)


def check_source(source: Source, path: str | Path) -> RecipeFile:
    """The recipe that `source` holds. Raises UsageError that lists every mistake, each with its place."""
    path = Path(path)
    try:
        # By way of JSON, where strict checking still takes a list for a tuple but not "5" for 5.
        recipe = Recipe.model_validate_json(json.dumps(source.data), strict=True)
    except pydantic.ValidationError as error:
        raise UsageError("\n".join(located(error, source))) from error
    conflicts = list(_conflicts(recipe))
    if conflicts:
        raise UsageError("\n".join(source.locate(key, message) for key, message in conflicts))
    base = (path.parent / (recipe.folder or ".")).resolve()
    return RecipeFile(recipe, path, base, source)


def _conflicts(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    """What is wrong between sections that are each well formed."""
    first: dict[str, int] = {}
    for index, task in enumerate(recipe.evaluate):
        if task.name in first:
            yield (
                ("evaluate", index, "name"),
                f"{task.name!r} is already the name of evaluate.{first[task.name]}: rename one",
            )
        first.setdefault(task.name, index)
        names = list(recipe.parents)
        if task.expert is not None and task.expert not in names and task.expert != BOTH:
            meant = did_you_mean(task.expert, names, listed=False) or f"; they are {', '.join(names)}"
            yield ("evaluate", index, "expert"), f"{task.expert!r} is none of the parents{meant}"
    for index, budget in enumerate(recipe.merge.budgets or ()):
        if budget > len(recipe.parents):
            yield (
                ("merge", "budgets", index),
                f"{budget:g} is more than all {len(recipe.parents)} parents side by side cost: at most "
                f"{len(recipe.parents)}",
            )


def _yaml_nearby(path: Path) -> str:
    folder = path.parent
    names = sorted(item.name for item in folder.glob("*.yaml")) if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {folder / close[0]}?" if close else ""
