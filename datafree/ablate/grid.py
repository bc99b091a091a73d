"""A grid: a recipe and axes, each a key of the recipe with its values; every cell is a checked recipe.

name: proxy-sources
recipe: ../cifar_resnet20.yaml            # or {label: path, ...}: an axis of its own, called `recipe`
seeds: [0, 1, 2]                          # the recipe's own where left out
set: {proxy.count: 512}                   # in every cell
axes:
  merge.ridge: [1e-3, 1e-2]               # a key and its values
  source:                                 # or a name, and what each of its values sets
    noise: {"proxy.sources": [{kind: noise}]}

Keys are spelt as `--set` takes them. Files in values start from the recipe's folder, recipes from the grid's.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datafree.ablate.axes import (
    RECIPE,
    SEED,
    Axis,
    Value,
    meant,
    read_assignments,
    read_axes,
    read_name,
    read_recipes,
    read_seeds,
    refuse_varied,
)
from datafree.errors import UsageError
from datafree.recipe import yaml_source
from datafree.recipe.file import RecipeFile, check_source, read_text
from datafree.recipe.yaml_source import Key, Source

MOST_CELLS = 10_000
_MOST_LINES = 30  # of a grid with more mistakes than anybody reads
_KEYS = ("name", "recipe", "seeds", "set", "axes")


@dataclass(frozen=True)
class Cell:
    """One run of a grid. labels: axis -> label, in the order of the axes."""

    labels: Mapping[str, str]
    seed: int
    recipe: RecipeFile

    @cached_property
    def fingerprint(self) -> str:
        return self.recipe.recipe.fingerprint()

    @property
    def title(self) -> str:
        """As a person reads it: "source noise, proxy.count 64, seed 0"."""
        return ", ".join([*(f"{axis} {label}" for axis, label in self.labels.items()), f"seed {self.seed}"])

    @cached_property
    def shared(self) -> str:
        """Equal for cells that make the same proxies, whatever their number."""
        recipe = self.recipe.recipe
        sources = [source.model_dump(mode="json") for source in recipe.proxy.sources]
        return json.dumps([str(self.recipe.path), self.seed, sources])


@dataclass(frozen=True)
class Grid:
    """A grid whose cells were all checked, in the order in which they run: what they share is made once."""

    name: str
    source: Source
    axes: tuple[Axis, ...]
    cells: tuple[Cell, ...]

    def only(self, choices: Sequence[str]) -> tuple[Cell, ...]:
        """The cells that `AXIS=LABEL` choices leave; several of one axis: any of them. Raises UsageError."""
        labels = {axis.name: [value.label for value in axis.values] for axis in self.axes}
        labels[SEED] = list(dict.fromkeys(str(cell.seed) for cell in self.cells))
        chosen: dict[str, set[str]] = {}
        for choice in choices:
            name, equals, label = choice.partition("=")
            if not equals or name not in labels:
                raise UsageError(
                    f"--only {choice}: expected AXIS=LABEL{meant(name, list(labels)) if equals else ''}"
                )
            if label not in labels[name]:
                raise UsageError(
                    f"--only {choice}: {label!r} is no value of {name}{meant(label, labels[name])}"
                )
            chosen.setdefault(name, set()).add(label)
        told = [({**cell.labels, SEED: str(cell.seed)}, cell) for cell in self.cells]
        return tuple(cell for of, cell in told if all(of[name] in known for name, known in chosen.items()))


def load_grid(path: str | Path, overrides: Sequence[str] = ()) -> Grid:
    """Read the grid in file `path` and check every cell, with `--set`-style `overrides` of the recipe.

    Raises UsageError that lists every mistake, each with the place where it was written. Files that the recipes name
    are not opened.
    """
    path = Path(path)
    source = yaml_source.parse(read_text(path, "grid"), str(path), "grid")
    for key in source.data:
        if key not in _KEYS:
            raise source.error((key,), f"unknown key{meant(key, _KEYS)}")
    name, recipes = read_name(source), read_recipes(source)
    axes, seeds = tuple(read_axes(source)), read_seeds(source)
    refuse_varied(axes, seeds, overrides)
    everywhere = (
        Value("", dict(read_assignments(source, ("set",))), ("set",)) if "set" in source.data else None
    )
    cells = _Cells(source, recipes, everywhere, axes, seeds, overrides).checked()
    named = (Axis(RECIPE, tuple(recipes.values())),) if isinstance(source.data["recipe"], dict) else ()
    return Grid(name, source, (*named, *axes), cells)


@dataclass(frozen=True)
class _Cells:
    """Every combination of recipe, seed and values, on its way to a checked recipe."""

    source: Source
    recipes: Mapping[str, Value]
    everywhere: Value | None
    axes: Sequence[Axis]
    seeds: Sequence[int] | None
    overrides: Sequence[str]

    def checked(self) -> tuple[Cell, ...]:
        """All cells in the order in which they run. Raises UsageError with every mistake."""
        count = len(self.recipes) * len(self.seeds or [0])
        for axis in self.axes:
            count *= len(axis.values)
        if count > MOST_CELLS:
            raise self.source.error(
                ("axes",), f"these are {count:,} cells; a grid has at most {MOST_CELLS:,}"
            )
        mistakes: dict[str, None] = {}
        cells: list[Cell] = []
        known: dict[str, tuple[Cell, tuple[Value, ...]]] = {}
        for label, start, number, values in self._combinations():
            try:
                cell = self._cell(label, start, number, values)
                other, others = known.setdefault(cell.fingerprint, (cell, values))
                if other is not cell:
                    raise self._twice(cell, values, other, others)
                cells.append(cell)
            except UsageError as error:
                mistakes |= dict.fromkeys(str(error).splitlines())
        if mistakes:
            lines = list(mistakes)
            more = (
                [f"and {len(lines) - _MOST_LINES:,} more: mend these first"]
                if len(lines) > _MOST_LINES
                else []
            )
            raise UsageError("\n".join([*lines[:_MOST_LINES], *more]))
        return in_order(cells)

    def _combinations(self) -> Iterator[tuple[str, Source, int | None, tuple[Value, ...]]]:
        """Label and text of a recipe, number of a seed, one value of every axis."""
        numbers = range(len(self.seeds)) if self.seeds is not None else (None,)
        for label, value in self.recipes.items():
            start = self._recipe(value)
            for number in numbers:
                for values in itertools.product(*(axis.values for axis in self.axes)):
                    yield label, start, number, values

    def _recipe(self, value: Value) -> Source:
        """The text of a recipe with what is set in every cell."""
        text = self._data(value.key)
        path = Path(os.path.normpath(Path(self.source.file).parent / Path(text).expanduser()))
        try:
            source = yaml_source.parse(read_text(path), str(path))
        except UsageError as error:
            raise self.source.error(value.key, str(error)) from error
        source = source if self.everywhere is None else self._put(source, self.everywhere)
        return yaml_source.override(source, self.overrides)

    def _cell(self, label: str, start: Source, number: int | None, values: Sequence[Value]) -> Cell:
        source = start
        for value in values:
            source = self._put(source, value)
        if number is not None:
            source = self._assign(source, SEED, ("seeds", number))
        recipe = check_source(source, source.file)
        labels = {RECIPE: label} if label else {}
        labels |= {axis.name: value.label for axis, value in zip(self.axes, values, strict=True)}
        return Cell(labels, recipe.recipe.seed, recipe)

    def _put(self, source: Source, value: Value) -> Source:
        for name, key in value.assignments.items():
            if self.seeds is not None and name.strip() == SEED:
                raise self.source.error(
                    key, "the seeds of this grid are given by `seeds`: remove one of the two"
                )
            source = self._assign(source, name, key)
        return source

    def _assign(self, source: Source, name: str, key: Key) -> Source:
        """`source` with the value that stands at `key` of the grid, and the places it has there."""
        parts = name.strip().split(".")
        if not all(parts):
            raise self.source.error(
                key, f"{name!r} is no key of a recipe; spell it as --set does: proxy.count"
            )
        places = {at[len(key) :]: place for at, place in self.source.places.items() if at[: len(key)] == key}
        return yaml_source.put(source, parts, self._data(key), places)

    def _data(self, key: Key) -> Any:
        data: Any = self.source.data
        for part in key:
            data = data[part]
        return data

    def _twice(self, cell: Cell, values: Sequence[Value], other: Cell, others: Sequence[Value]) -> UsageError:
        """Two cells are one: at the first value in which they differ."""
        keys = [self.recipes[cell.labels[RECIPE]].key] if RECIPE in cell.labels else []
        unequal = [one.key for one, two in zip(values, others, strict=True) if one.label != two.label]
        key = (*unequal, *keys, ("axes",))[0]
        return self.source.error(
            key,
            f"the cells ({cell.title}) and ({other.title}) are the same run: remove one of the two values",
        )


def in_order(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Seed by seed and recipe by recipe, so that a table is whole early; then cells with the same proxies together."""
    seeds = {seed: number for number, seed in enumerate(dict.fromkeys(cell.seed for cell in cells))}
    shared = {text: number for number, text in enumerate(dict.fromkeys(cell.shared for cell in cells))}
    return tuple(sorted(cells, key=lambda cell: (seeds[cell.seed], shared[cell.shared])))


def covering(cells: Sequence[Cell]) -> list[Cell]:
    """Few cells in which every value of every axis occurs, once for every recipe; seeds change nothing."""
    seen: set[tuple[str, str, str]] = set()
    chosen = []
    for cell in cells:
        recipe = str(cell.recipe.path)
        pairs = {(recipe, axis, label) for axis, label in cell.labels.items()} or {(recipe, "", "")}
        if not pairs <= seen:
            chosen.append(cell)
            seen |= pairs
    return chosen
