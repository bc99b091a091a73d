"""The pages of the documentation that follow from the sources: `python -m datafree.docs` writes them.

    docs/reference/recipe.md     every key of a recipe: type, default, meaning
    docs/reference/commands.md   the help of every command, with an example
    docs/recipe.schema.json      JSON schema of a recipe, for editors
    docs/tour.ipynb              docs/tour.md as a notebook

A test holds the files against what is generated.
"""

from __future__ import annotations

import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import click
from pydantic.fields import FieldInfo

from datafree.cli import main as commands
from datafree.proxy.source import SourceSpec
from datafree.recipe.schema import Recipe
from datafree.spec import Spec
from datafree.text import json_text

RECIPE, COMMANDS, SCHEMA = "reference/recipe.md", "reference/commands.md", "recipe.schema.json"
TOUR, NOTEBOOK = "tour.md", "tour.ipynb"
_NAMES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    type(None): "absent",
    Any: "any",
}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_WIDTH = 100

EXAMPLES = {  # command -> what one would type; a test parses each
    "check": "datafree check recipes/quickstart.yaml",
    "plan": "datafree plan recipes/quickstart.yaml --set 'merge.budgets=[1.0, 1.1]'",
    "merge": "datafree merge recipes/quickstart.yaml -o runs/digits --overwrite",
    "diagnose": "datafree diagnose recipes/quickstart.yaml --set proxy.count=128",
    "proxy": "datafree proxy recipes/quickstart.yaml -o runs/look --png",
    "ablate": "datafree ablate recipes/ablations/ridge.yaml -o runs/ridge --dry-run",
    "inspect": "datafree inspect timm:resnet50",
    "eval": "datafree eval runs/digits/budget-1 recipes/quickstart.yaml",
    "methods": "datafree methods",
    "env": "datafree env --json",
}

_RECIPE_HEAD = """\
# Recipe reference

<!-- Written by `python -m datafree.docs` from the classes that check recipes. -->

Every key of a recipe, section by section. Unknown keys are refused, with the nearest known one. A key without a default
is required. Relative paths start from the recipe's folder, or from `folder`; `${NAME}` is an environment variable.
Any key can be set for one run: `--set refine.steps=500`, `--set evaluate.0.images.limit=100`.

Editors complete and check recipes by [recipe.schema.json](../recipe.schema.json), for example with the first line
`# yaml-language-server: $schema=docs/recipe.schema.json`.
"""
_COMMANDS_HEAD = """\
# Command reference

<!-- Written by `python -m datafree.docs` from `datafree --help`. -->

Exit codes: 0 done, 1 a run that failed, 2 the caller's mistake, 130 and 143 interrupted by Ctrl-C and by SIGTERM.

Results go to standard output, progress and notes to standard error: a live bar in a terminal, lines in a pipe, where a
long stage says every half minute how far it is. `-q` shows none of it, `-v` more, `--log-file FILE` keeps it.

Completion of commands and options, for the shell at hand and, in its start-up file, for every later one:

```text
eval "$(_DATAFREE_COMPLETE=bash_source datafree)"      # bash: ~/.bashrc
eval "$(_DATAFREE_COMPLETE=zsh_source datafree)"       # zsh: ~/.zshrc
_DATAFREE_COMPLETE=fish_source datafree | source       # fish: ~/.config/fish/config.fish
```
"""


def pages(docs: Path) -> dict[str, str]:
    """Path below `docs`, where the tour lies -> content."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    tour = (docs / TOUR).read_text(encoding="utf-8")
    written = {RECIPE: recipe_page(), COMMANDS: commands_page(), SCHEMA: json_text(schema)}
    return {**written, NOTEBOOK: json_text(notebook(tour))}


# recipes ----------------------------------------------------------------------------------------------------


def recipe_page() -> str:
    parts = [_RECIPE_HEAD]
    for place, section, also in sections():
        title = f"`{place}`" if place else "The recipe"
        again = f"The same keys: {', '.join(f'`{other}`' for other in also)}.\n" if also else ""
        parts.append(
            "\n".join([f"## {title}\n", _meaning(section), *([again] if again else []), _table(section)])
        )
    return "\n".join(parts)


def sections() -> list[tuple[str, type[Spec], list[str]]]:
    """(where it first stands, the section's class, other places), in the order of the recipe."""
    found: dict[type[Spec], list[str]] = {}
    for place, section in _walk("", Recipe):
        found.setdefault(section, []).append(place)
    return [(places[0], section, places[1:]) for section, places in found.items()]


def _walk(place: str, section: type[Spec]) -> Iterator[tuple[str, type[Spec]]]:
    yield place, section
    for name, field in section.model_fields.items():
        for suffix, inner in _inside(field.annotation):
            here = f"{place}.{name}{suffix}".lstrip(".")
            for key in ("kind", "method"):  # what tells the members of a list apart
                if isinstance(inner.model_fields.get(key, field).default, str):
                    here = f"{here}, {key}: {inner.model_fields[key].default}"
            yield from _walk(here, inner)


def _inside(annotation: Any, suffix: str = "") -> Iterator[tuple[str, type[Spec]]]:
    """Sections in a type, each with what a path says of the lists and mappings around it."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        yield suffix, annotation
        return
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    step = ".NAME" if origin is dict else "[]" if origin is tuple else ""
    for argument in arguments[:1] if origin is typing.Annotated else arguments:
        yield from _inside(argument, suffix + step)


def _meaning(section: type[Spec]) -> str:
    """The class's own words: its first paragraph as it is, the keys after it as they are set."""
    first, _, rest = _dedented(section.__doc__ or "").partition("\n\n")
    for base in section.__mro__[1:]:
        if base is not Spec and issubclass(base, Spec):
            rest += "\n" + _dedented(base.__doc__ or "").partition("\n\n")[2]
        elif base is Spec:
            break
    return f"{' '.join(first.split())}\n" + (f"\n```text\n{rest.strip()}\n```\n" if rest.strip() else "")


def _dedented(text: str) -> str:
    first, _, rest = text.partition("\n")
    lines = rest.splitlines()
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join([first, *(line[margin:].rstrip() for line in lines)]).strip()


def _table(section: type[Spec]) -> str:
    rows = ["| key | type | default |", "|---|---|---|"]
    for name, field in section.model_fields.items():
        rows.append(f"| `{name}` | {_type(field.annotation)}{_limits(field)} | {_default(field)} |")
    return "\n".join(rows) + "\n"


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        kinds = [kind for kind in arguments if kind is not type(None)]
        if all(isinstance(kind, type) and issubclass(kind, SourceSpec) for kind in kinds):
            return "a source"
        return " or ".join(dict.fromkeys(_type(kind) for kind in kinds))
    if origin is tuple:
        inner = _type(arguments[0])
        return f"list of {inner}" if arguments[-1] is Ellipsis else f"list of {len(arguments)}: {inner}"
    if origin is dict:
        return f"mapping of names to {_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return "section"
    return _NAMES.get(annotation, str(annotation))


def _limits(field: FieldInfo) -> str:
    said = [
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, sign in _SIGNS.items()
        if getattr(limit, name, None) is not None
    ]
    return f", {' and '.join(said)}" if said else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Spec):
        return "its own defaults"
    if value is None or value in ((), {}):
        return "absent"
    if isinstance(value, tuple) and all(isinstance(one, Spec) for one in value):
        return f"`[{', '.join(str(getattr(one, 'method', 'its own defaults')) for one in value)}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


# commands ---------------------------------------------------------------------------------------------------


def commands_page() -> str:
    context = click.Context(commands, info_name="datafree", **_width())
    parts = [_COMMANDS_HEAD, _block("datafree", commands.get_help(context))]
    for name, command in commands.commands.items():
        own = click.Context(command, info_name=name, parent=context, **_width())
        parts.append(_block(f"datafree {name}", command.get_help(own), EXAMPLES.get(name)))
    return "\n".join(parts)


def _width() -> dict[str, Any]:
    return {"terminal_width": _WIDTH, "max_content_width": _WIDTH, "help_option_names": ["-h", "--help"]}


def _block(title: str, text: str, example: str | None = None) -> str:
    shown = "\n".join(line.rstrip() for line in text.strip().splitlines())
    said = f"\n```bash\n{example}\n```\n" if example else ""
    return f"## {title}\n{said}\n```text\n{shown}\n```\n"


# the tour ---------------------------------------------------------------------------------------------------


def notebook(text: str) -> dict[str, Any]:
    """A page with blocks of Python as a notebook (nbformat 4.5) that was not run."""
    cells = []
    for number, part in enumerate(re.split(r"^```python\n(.*?)^```\n", text, flags=re.DOTALL | re.MULTILINE)):
        code = number % 2 == 1
        if part.strip():
            cell: dict[str, Any] = {
                "cell_type": "code" if code else "markdown",
                "id": f"cell-{number}",
                "metadata": {},
            }
            cells.append({**cell, "source": part.strip().splitlines(keepends=True)})
            if code:
                cells[-1] |= {"execution_count": None, "outputs": []}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def main() -> None:
    """Write the pages into docs/ of the working directory."""
    root = Path("docs")
    if not root.is_dir():
        sys.exit("there is no folder docs here: run this from the root of the repository")
    for place, content in pages(root).items():
        path = root / place
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
