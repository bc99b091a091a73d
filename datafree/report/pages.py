"""The readable side of an artefact: the report of a run and the model card, from templates beside this
file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from datafree.artefact.card_data import UNKNOWN_LICENSE, metadata, own_row, reference_name, without_paths
from datafree.evaluation.results import Results, cells, columns

if TYPE_CHECKING:
    import pleas
    from datafree.artefact.description import Description


def html_report(results: Results, run: Mapping[str, Any], recipe: str) -> str:
    """The page of a run: one table, accuracy against FLOPs, residuals by layer, plans, proxies, recipe.

    run: the content of `run.json`      recipe: the resolved recipe's text
    """
    from datafree.report.charts import (  # matplotlib takes a second to import
        accuracy_chart,
        refine_chart,
        residual_chart,
    )

    return render(
        "report.html.j2",
        results=results,
        table=_table(results),
        accuracy=accuracy_chart(results),
        residuals=residual_chart(results),
        refining=refine_chart(run.get("refine", {})),
        run=run,
        recipe=recipe,
    )


def model_card(
    description: Description,
    result: pleas.MergeResult,
    results: Results | None = None,
    proxies: Sequence[Mapping[str, Any]] = (),
) -> str:
    """README.md of an artefact: metadata for the Hugging Face Hub, then text. No path of this machine is in it."""
    own = None if results is None else own_row(description, results)
    return render(
        "card.md.j2",
        metadata=metadata(description, results),
        unknown_license=UNKNOWN_LICENSE,
        description=description,
        result=result,
        results=results,
        table=None if results is None else _table(results),
        own=None if results is None or own is None else results.rows.index(own),
        proxies=proxies,
        worst=sorted(result.layers, key=lambda layer: -layer.residual)[:5],
    )


def _table(results: Results) -> dict[str, Any]:
    ours = [row.kind in ("merged", "refined") for row in results.rows]
    return {
        "columns": columns(results),
        "rows": [cells(results, row) for row in results.rows],
        "ours": ours,
        "notes": [row.note for row in results.rows],
    }


def _cell(text: str) -> str:
    """Text in a cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())


def render(template: str, **values: Any) -> str:
    """The text of a template beside this file; a value that it needs and is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("datafree.report"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"without_paths": without_paths, "reference_name": reference_name, "cell": _cell}
    return environment.get_template(template).render(**values)
