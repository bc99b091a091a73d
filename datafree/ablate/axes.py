"""The parts of a grid's text: its name, recipes, seeds and axes, each mistake with its place."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datafree.errors import UsageError
from datafree.recipe.yaml_source import Key, Source

RECIPE, SEED = "recipe", "seed"
# Columns of rows.csv that an axis cannot be called as well.
TAKEN = (
    SEED, "kind", "network", "point", "budget", "apart", "average", "joint", "predicted", "propagate", "ratio", "flops",
    "parameters", "seconds", "cell",
)  # fmt: skip


@dataclass(frozen=True)
class Value:
    """One value of an axis.

    assignments: key of a recipe -> where in the grid its value stands
    key:         where in the grid the value itself stands
    """

    label: str
    assignments: Mapping[str, Key]
    key: Key


@dataclass(frozen=True)
class Axis:
    """What is varied. numbers: of the labels that are numbers, where the axis is a key of the recipe."""

    name: str
    values: tuple[Value, ...]
    numbers: Mapping[str, float] = field(default_factory=dict)


def read_name(source: Source) -> str:
    name = source.data.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise source.error(
            ("name",), "a grid needs a `name` of letters, digits, '.', '_' and '-', for example ridge"
        )
    return name


def read_recipes(source: Source) -> dict[str, Value]:
    """Label -> where the path of its recipe stands; one label "" where there is but one recipe."""
    found = source.data.get("recipe")
    if isinstance(found, str):
        return {"": Value("", {}, ("recipe",))}
    if isinstance(found, dict) and found and all(isinstance(path, str) for path in found.values()):
        return {label: Value(label, {}, ("recipe", label)) for label in found}
    raise source.error(("recipe",), "give the path of a recipe, or a mapping `label: path` of several")


def read_seeds(source: Source) -> list[int] | None:
    if "seeds" not in source.data:
        return None
    seeds = source.data["seeds"]
    if not isinstance(seeds, list) or not seeds:
        raise source.error(("seeds",), "give a list of seeds, for example [0, 1, 2]")
    for index, seed in enumerate(seeds):
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise source.error(("seeds", index), f"a seed is a whole number from 0, not {seed!r}")
        if seed in seeds[:index]:
            raise source.error(("seeds", index), f"the seed {seed} is there twice: keep one")
    return seeds


def read_axes(source: Source) -> Iterator[Axis]:
    axes = source.data.get("axes", {})
    if not isinstance(axes, dict):
        raise source.error(
            ("axes",), "axes are a mapping of `key: [values]`, for example merge.ridge: [1e-3, 1e-2]"
        )
    for name, values in axes.items():
        key = ("axes", name)
        if name in TAKEN or name == RECIPE or not name:
            known = {SEED: ": give `seeds`", RECIPE: ": give `recipe: {label: path}`"}.get(name, "")
            raise source.error(
                key, f"an axis cannot be called {name!r}{known or ', which is a column of the table'}"
            )
        if not isinstance(values, list | dict) or not values:
            said = "it is empty" if values in ([], {}, None) else f"not {values!r}"
            raise source.error(
                key,
                f"an axis is a list of values, or a mapping `label: {{key: value}}`, with at least one; {said}",
            )
        yield _listed(source, name, values) if isinstance(values, list) else _labelled(source, name, values)


def _listed(source: Source, name: str, values: Sequence[Any]) -> Axis:
    """An axis that is a key of the recipe."""
    found: dict[str, Value] = {}
    for index, value in enumerate(values):
        key, label = ("axes", name, index), spell(value)
        if label in found:
            raise source.error(key, f"{label} is there twice: keep one")
        found[label] = Value(label, {name: key}, key)
    numbers = {
        spell(value): float(value)
        for value in values
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return Axis(name, tuple(found.values()), numbers)


def _labelled(source: Source, name: str, values: Mapping[str, Any]) -> Axis:
    """An axis whose values have names and set any keys."""
    found = [
        Value(label, dict(read_assignments(source, ("axes", name, label))), ("axes", name, label))
        for label in values
    ]
    return Axis(name, tuple(found))


def read_assignments(source: Source, key: Key) -> Iterator[tuple[str, Key]]:
    """What the mapping at `key` sets: key of a recipe -> place of its value in the grid."""
    given: Any = source.data
    for part in key:
        given = given[part]
    if not isinstance(given, dict):
        raise source.error(
            key, "give a mapping of keys of the recipe and their values, for example {proxy.count: 64}"
        )
    for name in given:
        yield name, (*key, name)


def refuse_varied(axes: Sequence[Axis], seeds: Sequence[int] | None, overrides: Sequence[str]) -> None:
    """Raise where an override sets what the grid varies, which would silently come to nothing."""
    varied = {name.strip(): axis.name for axis in axes for value in axis.values for name in value.assignments}
    varied |= {SEED: "seeds"} if seeds is not None else {}
    for override in overrides:
        name = override.partition("=")[0].strip()
        if name in varied:
            raise UsageError(
                f"--set {override}: the grid varies this key ({varied[name]}): change it in the grid"
            )


def spell(value: Any) -> str:
    """The label of a value."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def meant(found: str, known: Sequence[str]) -> str:
    """What somebody who wrote `found` may have meant."""
    close = difflib.get_close_matches(found, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"
