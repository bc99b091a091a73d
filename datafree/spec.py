"""The base of every section of a recipe, and how a recipe's text becomes a path.

A section's class stands beside the code that uses it (`models.parent.ParentSpec`, `images.image_set.ImageSpec`, ...),
derives from `Spec`, and is composed by `recipe.schema.Recipe`. Paths stay text in a section, so that a resolved
recipe reads the same on every machine; whoever opens the file calls `resolve_path(text, base)` with the
recipe's folder as `base`.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import pydantic

from datafree.errors import UsageError

DATA_VARIABLE = "DATAFREE_DATA"
_VARIABLE = re.compile(r"\$\{([^}]*)\}")


class Spec(pydantic.BaseModel):
    """A section of a recipe: immutable, without unknown keys, NaN or infinity; defaults are checked too."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True
    )


def expand_variables(text: str, base: Path) -> str:
    """`text` with each `${NAME}` replaced by the environment's value.

    `${DATAFREE_DATA}` alone has a default: the folder `shared` beside the project, `base/../../shared` for
    a recipe in `recipes/`. Raises UsageError for any other variable that is not set, or set to nothing.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        found = os.environ.get(name, "")
        if found:
            return found
        if name == DATA_VARIABLE:
            return str((base / ".." / ".." / "shared").resolve())
        raise UsageError(
            f"the environment variable {name!r} in {text!r} is not set: set it (export {name}=...), "
            "or write the path out in the recipe"
        )

    return _VARIABLE.sub(value, text)


def resolve_path(text: str, base: Path) -> Path:
    """The absolute path that `text` names in a recipe lying in folder `base`; the file need not exist.

    Variables are expanded (see `expand_variables`), `~` is the home folder, a relative path starts from
    `base`. Raises UsageError for text that can be no path: NUL in it, a name too long, links in a circle.
    """
    expanded = expand_variables(text, base)
    try:
        path = (base / Path(expanded).expanduser()).resolve()
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # said by whoever opens it
            path.lstat()
    except (OSError, RuntimeError, ValueError) as error:
        shown = text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."
        reason = (
            error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        )
        raise UsageError(f"{shown!r} can be no path ({reason}): give another") from error
    return path


_LONGEST_SHOWN = 100
