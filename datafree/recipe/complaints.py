"""Every complaint of the schema as `file:line:column: path.to.key: what is wrong, and the fix`."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Container, Sequence
from typing import Any, Literal

import pydantic

from datafree.recipe.schema import Recipe
from datafree.recipe.yaml_source import Key, Source
from datafree.spec import Spec

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
_MOST_DETAILS, _MOST_LINES = 200, 30  # of a text with more mistakes than anybody reads


def located(error: pydantic.ValidationError, source: Source) -> list[str]:
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
        if detail["type"] == "union_tag_invalid" and not isinstance(_at(source.data, key), str):
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


def _at(data: Any, key: Key) -> Any:
    for part in key:
        data = data[part]
    return data


def _misspelt(detail: Any) -> tuple[int | str, ...] | None:
    """The key that an unknown key was probably meant to be."""
    if detail["type"] != "extra_forbidden":
        return None
    *section, found = detail["loc"]
    close = difflib.get_close_matches(str(found), known_keys(Recipe, section), n=1)
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
        known = known_keys(Recipe, detail["loc"][:-1])
        return f"unknown key{did_you_mean(str(key[-1]), known)}"
    if kind == "missing":
        return "this key is required"
    if kind in ("literal_error", "union_tag_invalid"):
        expected = context.get("expected") or context["expected_tags"]
        found = context.get("tag", detail["input"])
        choices = [choice.strip().strip("'") for choice in str(expected).replace(" or ", ", ").split(",")]
        return f"must be {_any_of(choices)}, not {_short(found)}{did_you_mean(str(found), choices, listed=False)}"
    if kind == "union_tag_not_found":
        return f"the key {context['discriminator']} is required"
    if kind == "value_error":
        return str(context["error"])
    message = str(detail["msg"]).replace("Input should be", "must be")
    for pydantic_name, name in _TYPE_NAMES.items():
        message = message.replace(pydantic_name, name)
    return f"{message}, not {_short(detail['input'])}"


def _short(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _any_of(choices: Sequence[str]) -> str:
    quoted = [repr(choice) for choice in choices]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def did_you_mean(found: str, known: Sequence[str], listed: bool = True) -> str:
    close = difflib.get_close_matches(found, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; the keys here are {', '.join(known)}" if listed and known else ""


def known_keys(annotation: Any, loc: Sequence[int | str]) -> list[str]:
    """The keys that a section of type `annotation` takes at pydantic's location `loc` inside it."""
    members = _members(annotation)
    if not loc:
        return sorted({name for member in members if _is_spec(member) for name in member.model_fields})
    head, rest = loc[0], loc[1:]
    for member in members:
        if _is_spec(member):
            if isinstance(head, str) and head in member.model_fields:
                return known_keys(member.model_fields[head].annotation, rest)
            for variant in (member, *_variants(member)):
                if head == variant.__name__ or head in _tags(variant):
                    return known_keys(variant, rest)
        elif isinstance(head, int) and typing.get_args(member):
            return known_keys(typing.get_args(member)[0], rest)
        elif typing.get_origin(member) is dict:
            return known_keys(typing.get_args(member)[1], rest)
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
