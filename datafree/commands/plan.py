"""`datafree plan RECIPE`: what would be fused, what it would cost, how well it should go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from datafree.artefact.description import plan_table
from datafree.progress import progress_on
from datafree.recipe.file import load_recipe
from datafree.stages import (
    begin,
    exact_arithmetic,
    gather_evidence,
    load_parents,
    load_tasks,
    make_plans,
    make_proxies,
    proxy_inputs,
    solve_plans,
    trace_parents,
)
from datafree.tables import text_table
from datafree.text import json_text


def run(recipe: str, settings: Sequence[str], device: str, as_json: bool) -> None:
    work = begin(load_recipe(recipe, settings), device, progress_on())
    with work.progress, exact_arithmetic():
        parents = load_parents(work)
        tasks = load_tasks(work, parents)
        networks = trace_parents(work, parents)
        proxies = make_proxies(work, parents, tasks)
        evidence = gather_evidence(work, parents, networks, proxy_inputs(work, parents, proxies))
        merged = solve_plans(work, parents, evidence, make_plans(work, evidence))
    shown: list[dict[str, Any]] = [
        {
            "point": one.point.label,
            "flops": one.result.flops,
            "ratio": one.result.ratio,
            "parameters": one.result.parameters,
            "held_out_error": one.result.held_out_error,
            "propagate": one.result.propagate,
            "tried": [[t, error] for t, error in one.result.tried.items()],
            "classes": plan_table(networks, one.result.plan),
            "layers": [
                {
                    "layer": layer.name,
                    "residual": layer.residual,
                    "rows": layer.rows,
                    "unknowns": layer.unknowns,
                }
                for layer in one.result.layers
            ],
        }
        for one in merged
    ]
    click.echo(json_text(shown) if as_json else "\n".join(plan_text(plan) for plan in shown), nl=not as_json)


def plan_text(plan: dict[str, Any]) -> str:
    """One merged network as `plan` shows it."""
    title = click.style(
        f"{plan['point']}: {plan['flops']:,} FLOPs per image ({plan['ratio']:.3f} of one parent), "
        f"{plan['parameters']:,} parameters, error of the outputs on held-out proxies {plan['held_out_error']:.3f} "
        f"(propagate {plan['propagate']:g})",
        bold=True,
    )
    classes = text_table(
        ["class", "kind", "units", "fused", "apart", "width", "couples"],
        [
            [
                row["class"],
                row["kind"],
                *(str(row[key]) for key in ("units", "fused", "apart", "width")),
                _couples(row["couples"], row["reason"]),
            ]
            for row in plan["classes"]
        ],
        left=["kind", "couples"],
    )
    layers = text_table(
        ["layer", "residual %", "rows", "unknowns"],
        [
            [row["layer"], f"{100 * row['residual']:.2f}", str(row["rows"]), str(row["unknowns"])]
            for row in plan["layers"]
        ],
    )
    return "\n".join(["", title, "", classes, "", layers])


def _couples(names: Sequence[str], reason: str) -> str:
    more = f" - {len(names) - 3} more" if len(names) > 3 else ""
    return " - ".join(names[:3]) + more + (f"  ({reason})" if reason else "")
