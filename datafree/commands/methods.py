"""`datafree methods`: what a recipe's `compare` can name."""

from __future__ import annotations

from typing import Any

import click

from datafree.stages.comparing import listed_methods
from datafree.tables import text_table
from datafree.text import json_text


def run(as_json: bool) -> None:
    methods = listed_methods()
    if as_json:
        click.echo(json_text(methods), nl=False)
        return
    rows = [
        [
            one["method"],
            one["legend"],
            ", ".join(one["needs"]) or "nothing",
            _parents(one["most_parents"]),
            _keys(one),
        ]
        for one in methods
    ]
    columns = ["method", "what it is", "needs", "parents", "keys and defaults"]
    click.echo(text_table(columns, rows, left=columns[1:]))
    click.echo(
        "\nIn a recipe: `compare: all`, or `compare: [permutation, {method: regmean, off_diagonal: 0.8}]`."
    )


def _parents(most: int | None) -> str:
    return "any" if most is None else f"{most} at most"


def _keys(one: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {_yaml(value)}" for key, value in one["keys"].items())


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else f"{value}"
