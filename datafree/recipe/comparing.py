"""The recipe's `compare`: which other methods stand beside ours in the table, each with its own keys.

A method's keys are the fields of its dataclass in `pleas.comparators`; nothing is written twice.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import pydantic
from pydantic import Field, create_model, model_validator

import pleas
from datafree.spec import Spec
from pleas.comparators import METHODS, Comparator

ALL = "all"


class MethodSpec(Spec):
    """One entry of `compare`: `method`, and that method's keys."""

    method: str = ""  # every entry has its own

    def comparator(self) -> Comparator:
        """The method with these keys."""
        content = {name: getattr(self, name) for name in type(self).model_fields if name != "method"}
        return METHODS[self.method](**content)

    @model_validator(mode="after")
    def _in_range(self) -> MethodSpec:
        if type(self) is not AllSpec:
            try:
                self.comparator()
            except pleas.InputError as error:
                raise ValueError(str(error)) from error
        return self


class AllSpec(MethodSpec):
    """Every method that can run on these parents, with its defaults; the table says why the others cannot."""

    method: Literal["all"] = "all"  # pyright: ignore[reportIncompatibleVariableOverride]


def _spec_of(name: str, method: type[Comparator]) -> type[MethodSpec]:
    hints = typing.get_type_hints(method, include_extras=True)
    literal: Any = Literal
    keys: dict[str, Any] = {"method": (literal[name], name)}
    keys |= {field.name: (hints[field.name], field.default) for field in dataclasses.fields(method)}
    title = re.sub(r"\W", "", method.__name__) + "Spec"
    return create_model(title, __base__=MethodSpec, __doc__=method.__doc__, **keys)


SPECS: dict[str, type[MethodSpec]] = {name: _spec_of(name, method) for name, method in METHODS.items()}

if TYPE_CHECKING:
    AnyMethod = MethodSpec
else:
    AnyMethod = Annotated[Union[(AllSpec, *SPECS.values())], Field(discriminator="method")]


def spelt_out(value: Any) -> Any:
    """`all` and `[permutation, {method: regmean}]` as a tuple of mappings."""
    entries = [value] if isinstance(value, str | dict) else value
    if not isinstance(entries, list | tuple):
        return value
    return tuple({"method": entry} if isinstance(entry, str) else entry for entry in entries)


def once(entries: tuple[MethodSpec, ...]) -> tuple[MethodSpec, ...]:
    """Raises ValueError where two entries are the same."""
    seen: list[MethodSpec] = []
    for entry in entries:
        if entry in seen:
            raise ValueError(f"{entry.method!r} is there twice with the same keys: keep one")
        seen.append(entry)
    return entries


Compare = Annotated[tuple[AnyMethod, ...], pydantic.BeforeValidator(spelt_out), pydantic.AfterValidator(once)]
DEFAULT: tuple[MethodSpec, ...] = (SPECS["average"](), SPECS["permutation"]())
