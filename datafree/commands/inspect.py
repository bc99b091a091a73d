"""`datafree inspect`: which parameters of a model move together, and why the others do not; or an "
"artefact's card."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

import pleas
from datafree.artefact import CARD, load
from datafree.errors import UsageError
from datafree.recipe import load_recipe
from datafree.references import build
from datafree.report import json_text
from datafree.stages import begin, load_parents
from datafree.tables import text_table
from datafree.yaml_source import parse
from pleas.symmetry import UnitClass, state_of

AXES = ("out", "in")  # of a weight; further dimensions are numbered


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
    symmetry = pleas.trace(model, example, strict=strict)
    facts = describe(symmetry, model)
    click.echo(json_text(facts) if as_json else _text(facts), nl=not as_json)


def _artefact(folder: Path, as_json: bool) -> str:
    artefact = load(folder)
    if as_json:
        return json_text({key: value for key, value in artefact.config.items() if key != "network"})
    return (folder / CARD).read_text(encoding="utf-8")


def _from_recipe(recipe: str) -> tuple[nn.Module, torch.Tensor]:
    parents = load_parents(begin(load_recipe(recipe), "cpu"), probe=True)
    return parents.a.module, parents.example


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


def describe(symmetry: pleas.Symmetry, model: nn.Module) -> dict[str, Any]:
    """The symmetry as plain data: classes with what they couple, fixed axes by reason, operations "
    "without a rule."""
    state = state_of(symmetry.program, model)
    fixed: dict[str, list[str]] = {}
    for (tensor, dim), reason in symmetry.fixed.items():
        fixed.setdefault(reason, []).append(_axis(tensor, dim, state[tensor].dim()))
    covered = {axis.tensor for unit_class in symmetry.classes for axis in unit_class.axes}
    parameters = {
        name: state[name].numel() for name in (*symmetry.program.parameters, *symmetry.program.added)
    }
    total = sum(parameters.values())
    return {
        "classes": [_class(unit_class, state) for unit_class in symmetry.classes],
        "fixed": [{"reason": reason, "axes": axes} for reason, axes in fixed.items()],
        "unlisted": [str(item) for item in symmetry.unlisted],
        "notes": list(symmetry.program.notes),
        "gate_error": symmetry.gate_error,
        "parameters": total,
        "permutable": sum(count for name, count in parameters.items() if name in covered) / max(1, total),
    }


def _class(unit_class: UnitClass, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    axes = [(axis.tensor, axis.dim) for axis in unit_class.axes]
    return {
        "name": unit_class.name,
        "kind": unit_class.kind,
        "units": unit_class.size,
        "widenable": unit_class.widenable,
        "reason": unit_class.reason,
        "couples": _coupled(axes, state),
        "axes": [{"tensor": tensor, "dim": dim} for tensor, dim in axes],
        "inner": [child.size for child in unit_class.children[0]] if unit_class.children else [],
        "parameters": sum(state[name].numel() for name in {tensor for tensor, _ in axes}),
    }


def _coupled(axes: Sequence[tuple[str, int]], state: dict[str, torch.Tensor]) -> list[str]:
    """`conv1.weight[out]`, `bn1.*`: the vectors of one module are one entry."""
    vectors: dict[str, list[str]] = {}
    for tensor, _ in axes:
        if state[tensor].dim() == 1:
            vectors.setdefault(tensor.rpartition(".")[0], []).append(tensor)
    shown: dict[str, None] = {}
    for tensor, dim in axes:
        module = tensor.rpartition(".")[0]
        whole = len(vectors.get(module, ())) > 1 and tensor in vectors[module]
        shown[f"{module}.*" if whole else _axis(tensor, dim, state[tensor].dim())] = None
    return list(shown)


def _axis(tensor: str, dim: int, dims: int) -> str:
    if dims <= 1:
        return tensor
    return f"{tensor}[{AXES[dim] if dim < len(AXES) else dim}]"


def _text(facts: dict[str, Any]) -> str:
    rows = []
    for item in facts["classes"]:
        inner = f" of {' and '.join(map(str, item['inner']))}" if item["inner"] else ""
        rows.append(
            [
                item["name"],
                item["kind"],
                f"{item['units']}{inner}",
                "yes" if item["widenable"] else "no",
                f"{item['parameters']:,}",
                " - ".join(item["couples"]) + (f"  ({item['reason']})" if item["reason"] else ""),
            ]
        )
    lines = [
        text_table(
            ["class", "kind", "units", "widens", "parameters", "couples"],
            rows,
            left=["kind", "widens", "couples"],
        ),
        "",
        f"{facts['parameters']:,} parameters, {100 * facts['permutable']:.2f} % of them in tensors with "
        "exchangeable units; "
        f"verified by one random permutation of every class to {facts['gate_error']:.1e}",
    ]
    if facts["fixed"]:
        lines += ["", "fixed axes:"]
        lines += [f"  {item['reason']}: {', '.join(item['axes'])}" for item in facts["fixed"]]
    if facts["unlisted"]:
        lines += ["", "operations without a rule (what they touch stays in place):"]
        lines += [f"  {item}" for item in facts["unlisted"]]
    return "\n".join([*lines, *(f"note: {note}" for note in facts["notes"])])
