"""A recipe: everything that decides the numbers of a merge, checked before anything heavy starts.

Each section's class stands beside the code that uses it; here they are composed, checked against each
other, and every complaint is turned into `file:line:column: path.to.key: what is wrong, and the fix`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import types
import typing
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, field_validator, model_validator

import pleas
from datafree import yaml_source
from datafree.errors import UsageError
from datafree.evaluate import BOTH, TaskSpec
from datafree.images import ImageSpec
from datafree.models import ParentSpec
from datafree.proxy import ProxySpec
from datafree.proxy.inversion import InversionSpec
from datafree.spec import Spec
from datafree.yaml_source import Key, Source
from pleas.parents import MOST


class MergeSpec(Spec):
    """How the parents are merged; one merged model per entry of `budgets` or `apart`, all from one pass of
    statistics.

    budgets: multiply-adds of the merged model relative to one parent, from 1 to the number of parents
    apart:   the other way to say it: the fraction of every class's units that stays apart, 0 to 1
    batch:   images per forward pass while statistics are collected
    The other keys are those of `pleas.MergeSettings`.
    """

    budgets: tuple[float, ...] | None = None
    apart: tuple[float, ...] | None = None
    matching: Literal["activation", "weight"] = "activation"
    allocation: Literal["error", "uniform", "zip", "early"] = "error"
    propagate: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    ridge: float = Field(default=1e-2, gt=0)
    head_ridge: float = Field(default=0.1, gt=0)
    holdout: float = Field(default=0.125, gt=0, le=0.5)
    rows: int = Field(default=16, ge=1)
    positions: int = Field(default=64, ge=1)
    min_rows: float = Field(default=0.25, ge=0, le=1e6)
    batch: int = Field(default=64, ge=1)

    @field_validator("budgets")
    @classmethod
    def _budgets_in_range(cls, budgets: tuple[float, ...] | None) -> tuple[float, ...] | None:
        return _points(
            budgets,
            1.0,
            None,
            "a budget is multiply-adds relative to one parent: 1 is one parent, 2 two of them side by side",
        )

    @field_validator("apart")
    @classmethod
    def _apart_in_range(cls, apart: tuple[float, ...] | None) -> tuple[float, ...] | None:
        return _points(apart, 0.0, 1.0, "it is the fraction of units kept apart: 0 fuses all, 1 fuses none")

    @model_validator(mode="after")
    def _one_of_budgets_and_apart(self) -> MergeSpec:
        if (self.budgets is None) == (self.apart is None):
            found = "neither is given" if self.budgets is None else "both are given"
            raise ValueError(
                f"give exactly one of `budgets` (for example [1.0, 1.25]) and `apart` ([0, 0.25]); {found}"
            )
        return self

    def settings(self, labels: Literal["shared", "separate"], seed: int) -> pleas.MergeSettings:
        return pleas.MergeSettings(
            matching=self.matching,
            allocation=self.allocation,
            heads=labels,
            propagate=self.propagate,
            ridge=self.ridge,
            head_ridge=self.head_ridge,
            holdout=self.holdout,
            rows=self.rows,
            positions=self.positions,
            min_rows=self.min_rows,
            seed=seed,
        )


def _points(
    values: tuple[float, ...] | None, low: float, high: float | None, meaning: str
) -> tuple[float, ...] | None:
    if values is None:
        return None
    if not values:
        raise ValueError("the list is empty: give at least one value")
    for value in values:
        if high is None and value < low:
            raise ValueError(f"{value:g} is below {low:g}; {meaning}")
        if high is not None and not low <= value <= high:
            raise ValueError(f"{value:g} is outside [{low:g}, {high:g}]; {meaning}")
    if len(set(values)) < len(values):
        raise ValueError(f"a value appears twice in {list(values)}: keep each once")
    return values


class ProxySection(ProxySpec):
    """The proxies, and whether evaluation images among them are let through (the report then says so)."""

    allow_leak: bool = False


class OracleSpec(Spec):
    """The same merge from `count` real images, reported beside ours as what data would have given."""

    count: int = Field(ge=1)
    images: ImageSpec


class FreshSpec(Spec):
    """New proxies while refining: inverted images on which the network and its parents disagree.

    rounds: how often, evenly over the run    count: images of a round
    weight: of the disagreement beside the inversion's own loss
    """

    rounds: int = Field(default=3, ge=1)
    count: int = Field(default=256, ge=1)
    weight: float = Field(default=1.0, gt=0)


class RefineSpec(Spec):
    """A short distillation of all parents into every merged network, on the proxies alone; its keys are those of
    `pleas.refine.RefineSettings`. Give `steps`, or `minutes` per network.

    augment: shift: moved a little and mirrored; light: kornia's crops, mirrors and colours, as for proxies; none
    fresh: new proxies while training, for recipes with a source of kind: inversion; they count as proxies of that kind
    curve: how often, evenly over the run, a network is kept for the report's curve of accuracy, 0: no curve. The test
        images are looked at when all networks are final
    """

    steps: int | None = Field(default=None, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    batch: int = Field(default=64, ge=1)
    rate: float = Field(default=1e-3, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    temperature: float = Field(default=1.0, gt=0)
    logit_weight: float = Field(default=1.0, ge=0)
    joint_weight: float = Field(default=0.0, ge=0)
    feature_weight: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    average: float = Field(default=0.99, ge=0, lt=1)
    batch_statistics: bool = True
    views: int = Field(default=512, ge=0)
    mix: float = Field(default=0.0, ge=0, le=1)
    holdout: float = Field(default=0.1, gt=0, le=0.5)
    patience: int | None = Field(default=None, ge=1)
    augment: Literal["shift", "light", "none"] = "shift"
    fresh: FreshSpec | None = None
    curve: int = Field(default=5, ge=0, le=20)

    @model_validator(mode="after")
    def _steps_or_minutes(self) -> RefineSpec:
        if self.steps is not None and self.minutes is not None:
            raise ValueError("give `steps` or `minutes`, not both")
        return self


class Recipe(Spec):
    """One merge: parents, labels, proxies, settings and how the result is judged.

    parents: two or more of one architecture, by names of your choice
    labels: "shared" (all parents predict the same classes: one head) or "separate" (one head per parent)
    folder: where relative paths start; the recipe's own folder when absent
    license, base_models: for the model cards, as the Hugging Face Hub names them: apache-2.0, [me/a, me/b]
    """

    name: str
    seed: int = Field(default=0, ge=0)
    folder: str | None = None
    parents: dict[str, ParentSpec]
    labels: Literal["shared", "separate"] = "shared"
    proxy: ProxySection
    merge: MergeSpec
    refine: RefineSpec | None = None
    evaluate: tuple[TaskSpec, ...] = ()
    oracle: OracleSpec | None = None
    license: str | None = Field(default=None, min_length=1, max_length=100)
    base_models: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = ()

    @field_validator("name")
    @classmethod
    def _usable_as_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(
                f"{name!r} also names the output folder: use letters, digits, '.', '_' and '-', starting "
                "with a letter or digit"
            )
        return name

    @field_validator("parents")
    @classmethod
    def _several(cls, parents: dict[str, ParentSpec]) -> dict[str, ParentSpec]:
        if not 2 <= len(parents) <= MOST:
            raise ValueError(
                f"{len(parents)} parent{'s' * (len(parents) != 1)}: a merge takes 2 to {MOST} networks of one "
                "architecture, as `parents: {first: {model: ...}, second: {model: ...}}`"
            )
        for name in parents:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(
                    f"{name!r} is no name for a parent: use letters, digits, '.', '_' and '-', starting with a "
                    "letter or digit"
                )
        if BOTH in parents:
            raise ValueError(
                f"{BOTH!r} is no name for a parent: as the expert of a task it means all parents; give another"
            )
        return parents

    @model_validator(mode="after")
    def _fresh_from_somewhere(self) -> Recipe:
        fresh = self.refine is not None and self.refine.fresh is not None
        if fresh and not any(isinstance(source, InversionSpec) for source in self.proxy.sources):
            raise ValueError(
                "refine.fresh looks for new images by inversion, and proxy.sources has no kind: inversion: add such a "
                "source, or remove refine.fresh"
            )
        return self

    def fingerprint(self) -> str:
        """SHA-256 of every key that can change a number, and of the parents' order: all of them but `folder`, which
        only says where files lie, and what only a model card reads.
        """
        content = self.model_dump(mode="json", exclude={"folder", "license", "base_models"})
        content["parents"] = list(content["parents"].items())
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(4 * yaml_source.MOST_TEXT + 1)  # a character is at most four bytes
    except FileNotFoundError as error:
        raise UsageError(
            f"{path}: no such recipe; give the path of a .yaml file{_yaml_nearby(path)}"
        ) from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > 4 * yaml_source.MOST_TEXT:
        raise UsageError(f"{path}:1:1: this is larger than any recipe; give the path of a .yaml file")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        place = yaml_source.locate(str(path), content[: error.start].decode())
        raise UsageError(
            f"{place}: not a text file (byte {error.start} is not UTF-8); a recipe is YAML"
        ) from error
    return parse_recipe(text.replace("\r\n", "\n").replace("\r", "\n"), path, overrides)


def parse_recipe(text: str, path: str | Path, overrides: Sequence[str] = ()) -> RecipeFile:
    """As `load_recipe`, from text; `path` names it in errors and its folder is where relative paths start."""
    path = Path(path)
    source = yaml_source.override(yaml_source.parse(text, str(path)), overrides)
    try:
        # By way of JSON, where strict checking still takes a list for a tuple but not "5" for 5.
        recipe = Recipe.model_validate_json(json.dumps(source.data), strict=True)
    except pydantic.ValidationError as error:
        raise UsageError("\n".join(_located(error, source))) from error
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
            meant = _did_you_mean(task.expert, names, listed=False) or f"; they are {', '.join(names)}"
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


# Pydantic's complaints in our words
# ---------------------------------------------------------------------------------

_MOST_DETAILS, _MOST_LINES = 200, 30  # of a text with more mistakes than anybody reads


def _located(error: pydantic.ValidationError, source: Source) -> list[str]:
    """One line per mistake, in the order of the file."""
    told: dict[Key, list[str]] = {}
    details: list[Any] = list(error.errors(include_url=False))[:_MOST_DETAILS]
    meant = {_misspelt(detail) for detail in details}
    for detail in details:
        if detail["type"] == "too_short" and detail["input"]:
            continue  # an item of the list is wrong, which pydantic tells as well
        if detail["type"] == "missing" and detail["loc"] in meant:
            continue  # it is there, misspelt
        key = _data_key(detail["loc"], source.data, detail["type"])
        if detail["type"] == "union_tag_invalid":
            key = (*key, detail["ctx"]["discriminator"].strip("'"))
        message = _message(detail, key)
        messages = told.setdefault(key, [])
        if message not in messages:
            messages.append(message)
    lines = [(source.place(key), key, " or ".join(messages)) for key, messages in told.items()]
    lines.sort(key=lambda line: _sort_key(line[0]))
    said = [source.locate(key, message) for _, key, message in lines[:_MOST_LINES]]
    if error.error_count() > _MOST_DETAILS or len(lines) > _MOST_LINES:
        said.append(f"and {error.error_count() - len(said):,} more: mend these first")
    return said


def _misspelt(detail: Any) -> tuple[int | str, ...] | None:
    """The key that an unknown key was probably meant to be."""
    if detail["type"] != "extra_forbidden":
        return None
    *section, found = detail["loc"]
    close = difflib.get_close_matches(str(found), _known_keys(Recipe, section), n=1)
    return (*section, close[0]) if close else None


def _sort_key(place: str) -> tuple[int, int]:
    parts = place.rsplit(":", 2)
    return (int(parts[1]), int(parts[2])) if len(parts) == 3 and parts[2].isdigit() else (0, 0)


def _data_key(loc: tuple[int | str, ...], data: Any, kind: str) -> Key:
    """Pydantic's location without the names of union members, which stand in it but not in the file."""
    key: list[int | str] = []
    for position, part in enumerate(loc):
        if part in _parts(data):
            key.append(part)
            data = data[part]
        elif kind == "missing" and position == len(loc) - 1:
            key.append(part)
    return tuple(key)


def _parts(data: Any) -> Container[Any]:
    """The keys of a mapping, the indices of a list; nothing inside anything else."""
    return range(len(data)) if isinstance(data, list) else data if isinstance(data, dict) else ()


def _message(detail: Any, key: Key) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        known = _known_keys(Recipe, detail["loc"][:-1])
        return f"unknown key{_did_you_mean(str(key[-1]), known)}"
    if kind == "missing":
        return "this key is required"
    if kind in ("literal_error", "union_tag_invalid"):
        expected = context.get("expected") or context["expected_tags"]
        found = context.get("tag", detail["input"])
        choices = [choice.strip().strip("'") for choice in str(expected).replace(" or ", ", ").split(",")]
        return f"must be {_any_of(choices)}, not {_short(found)}{_did_you_mean(str(found), choices, listed=False)}"
    if kind == "union_tag_not_found":
        return f"the key {context['discriminator']} is required"
    if kind == "value_error":
        return str(context["error"])
    message = str(detail["msg"]).replace("Input should be", "must be")
    for pydantic_name, name in _TYPE_NAMES.items():
        message = message.replace(pydantic_name, name)
    return f"{message}, not {_short(detail['input'])}"


_TYPE_NAMES = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid tuple": "a list",
    "a valid array": "a list",
    "a valid dictionary": "a mapping",
    "an object": "a mapping",
    "a valid boolean": "true or false",
}


def _short(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _any_of(choices: Sequence[str]) -> str:
    quoted = [repr(choice) for choice in choices]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def _did_you_mean(found: str, known: Sequence[str], listed: bool = True) -> str:
    close = difflib.get_close_matches(found, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; the keys here are {', '.join(known)}" if listed and known else ""


def _known_keys(annotation: Any, loc: Sequence[int | str]) -> list[str]:
    """The keys that a section of type `annotation` takes at pydantic's location `loc` inside it."""
    members = _members(annotation)
    if not loc:
        return sorted({name for member in members if _is_spec(member) for name in member.model_fields})
    head, rest = loc[0], loc[1:]
    for member in members:
        if _is_spec(member):
            if isinstance(head, str) and head in member.model_fields:
                return _known_keys(member.model_fields[head].annotation, rest)
            for variant in (member, *_variants(member)):
                if head == variant.__name__ or head in _tags(variant):
                    return _known_keys(variant, rest)
        elif isinstance(head, int) and typing.get_args(member):
            return _known_keys(typing.get_args(member)[0], rest)
        elif typing.get_origin(member) is dict:
            return _known_keys(typing.get_args(member)[1], rest)
    return []


def _members(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin is typing.Union or origin is types.UnionType:
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    return [annotation]


def _is_spec(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Spec)


def _variants(spec: type[Spec]) -> list[type[Spec]]:
    """Every class derived from a section, such as the kinds of proxy source."""
    return [variant for child in spec.__subclasses__() for variant in (child, *_variants(child))]


def _tags(spec: type[Spec]) -> list[Any]:
    """The values of a section's literal keys, such as `kind`, by which pydantic tells union members apart."""
    return [
        value
        for field in spec.model_fields.values()
        if typing.get_origin(field.annotation) is Literal
        for value in typing.get_args(field.annotation)
    ]
