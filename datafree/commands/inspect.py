"""`datafree inspect`: which parameters of a model move together, and why the others do not; or an artefact's card."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

import pleas
from datafree.artefact.load import load, read_card
from datafree.errors import UsageError
from datafree.recipe.file import load_recipe
from datafree.recipe.yaml_source import parse
from datafree.references.registry import build
from datafree.stages import begin, load_parents
from datafree.tables import text_table
from datafree.text import json_text
from pleas.errors import UnsupportedModel
from pleas.plan.extent import extents
from pleas.symmetry import RULE_HELPS

SHOWN = 6  # tensors listed per group, reason or op


def run(target: str, arguments: Sequence[str], shape: str | None, strict: bool, as_json: bool) -> None:
    path = Path(target)
    if path.is_dir():
        click.echo(_artefact(path, as_json), nl=False)
        return
    model, example = (
        _from_recipe(target)
        if path.suffix in (".yaml", ".yml")
        else _from_reference(target, arguments, shape)
    )
    try:
        symmetry = pleas.trace(model, example, strict=strict)
    except UnsupportedModel as error:
        if as_json:
            click.echo(json_text(_refusal(error)), nl=False)
        raise
    facts = _facts(symmetry)
    click.echo(json_text(facts) if as_json else _text(facts), nl=not as_json)


def _facts(symmetry: pleas.Symmetry) -> dict[str, Any]:
    """The table of the tracer, with what every class governs and what would help an op without a rule."""
    facts = symmetry.describe()
    whole, parts = extents(symmetry)
    classes = [item | asdict(part) for item, part in zip(facts["classes"], parts, strict=True)]
    unlisted = [item | {"help": RULE_HELPS} for item in facts["unlisted"]]
    return {"supported": True} | asdict(whole) | facts | {"classes": classes, "unlisted": unlisted}


def _refusal(error: UnsupportedModel) -> dict[str, Any]:
    return {"supported": False, "error": str(error), "operations": list(error.operations)}


def _artefact(folder: Path, as_json: bool) -> str:
    artefact = load(folder)
    if as_json:
        return json_text({key: value for key, value in artefact.config.items() if key != "network"})
    return read_card(folder)


def _from_recipe(recipe: str) -> tuple[nn.Module, torch.Tensor]:
    parents = load_parents(begin(load_recipe(recipe), "cpu"), probe=True)
    return parents.first.module, parents.example


def _from_reference(
    reference: str, arguments: Sequence[str], shape: str | None
) -> tuple[nn.Module, torch.Tensor]:
    given: dict[str, Any] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name:
            raise UsageError(
                f"--argument {argument}: expected KEY=VALUE, for example --argument num_classes=10"
            )
        given[name] = parse(f"value: {value}", f"--argument {argument}").data["value"]
    blueprint = build(reference, given, Path.cwd())
    if shape is None and "size" not in blueprint.configured:
        raise UsageError(
            f"{reference} does not say how large its input is: add --input CxHxW, for example --input 3x32x32"
        )
    if shape is None:
        size = blueprint.configured["size"]
        height, width = (size, size) if isinstance(size, int) else size
        sides = [len(blueprint.configured.get("mean", (0, 0, 0))), height, width]
    elif re.fullmatch(r"[0-9]+x[0-9]+x[0-9]+", shape):
        sides = [int(side) for side in shape.split("x")]
    else:
        raise UsageError(f"--input {shape}: expected CxHxW, for example 3x224x224")
    return blueprint.module.eval(), torch.zeros(2, *sides)


def _text(facts: dict[str, Any]) -> str:
    rows = [
        [
            item["name"],
            item["kind"],
            f"{item['size']}{_inside(item['children'])}",
            f"{item['parameters']:,}",
            f"{item['multiply_adds']:,}",
            f"no: {item['reason']}" if item["reason"] else "yes",
            _shortened(item["coupled"].split(" - "), " - "),
        ]
        for item in facts["classes"]
    ]
    columns = ["group", "kind", "units", "parameters", "multiply-adds", "widens", "coupled parameters"]
    fixed = _fixed(facts["fixed"])
    lines = [
        text_table(columns, rows, left=["kind", "widens", "coupled parameters"]),
        "",
        f"{facts['parameters']:,} parameters, {facts['multiply_adds']:,} multiply-adds per image; a weight between "
        "two groups counts for both.",
        f"{100 * facts['permutable_share']:.2f} % of the parameters stand on exchangeable units; "
        "verified by one "
        f"random permutation of every group: relative error {facts['gate_error']:.1e}",
    ]
    lines += ["", "axes that stay in place:"] if fixed else []
    lines += [f"  {line}" for line in fixed]
    lines += (
        ["", "operations without a rule, and the parameters they keep in place:"] if facts["unlisted"] else []
    )
    lines += [
        f"  {item['op']} in {item['module'] or 'the model itself'}: "
        f"{_shortened(item['parameters'], ', ') or 'none'}; what would help: {item['help']}"
        for item in facts["unlisted"]
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in facts["notes"])])


def _fixed(items: Sequence[dict[str, Any]]) -> list[str]:
    """Fixed axes by reason, whatever module the reason names: `convolution fixes its position:
    conv1.weight[1, 2, 3]`.
    """
    by_reason: dict[str, dict[str, list[str]]] = {}
    for item in items:
        reason = re.sub(r" in (the model|\S+) fixes", " fixes", item["reason"])
        by_reason.setdefault(reason, {}).setdefault(item["tensor"], []).append(str(item["dim"]))
    lines = []
    for reason, tensors in by_reason.items():
        named = [f"{name}[{', '.join(dims)}]" for name, dims in tensors.items()]
        lines.append(f"{reason}: {_shortened(named, ', ')}")
    return lines


def _shortened(names: Sequence[str], separator: str) -> str:
    more = f" and {len(names) - SHOWN} more (--json lists all)" if len(names) > SHOWN else ""
    return separator.join(names[:SHOWN]) + more


def _inside(children: Sequence[dict[str, Any]]) -> str:
    return f" of {' and '.join(str(child['size']) for child in children)}" if children else ""
