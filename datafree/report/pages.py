"""The readable side of an artefact: the report of a run and the model card, from templates beside this
file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from datafree.artefact.card_data import UNKNOWN_LICENSE, metadata, own_row, reference_name, without_paths
from datafree.evaluation.results import Results, cells, columns, legend

if TYPE_CHECKING:
    import pleas
    from datafree.artefact.description import Description
    from datafree.report.sheets import Sheet


def html_report(results: Results, run: Mapping[str, Any], recipe: str, sheets: Sequence[Sheet] = ()) -> str:
    """The page of a run: one file that asks for nothing else, for light and dark, screens, phones and paper.

    run: the content of `run.json`      recipe: the resolved recipe's text      sheets: what the proxies look like
    """
    from datafree.report import charts, view  # matplotlib takes a second to import
    from datafree.report.themed import OURS, PARENTS, Key

    parents = [row.name for row in results.of_kind("parent")]
    plans = [(point, {**plan, "bars": view.widths(plan, parents)}) for point, plan in results.plans.items()]
    own = None if results.verdict is None or results.verdict.row is None else results.verdict.row.point
    owners = [Key("all parents", OURS, None)]
    owners += [Key(f"{name} alone", PARENTS[i % len(PARENTS)], None) for i, name in enumerate(parents)]
    return render(
        "report.html.j2",
        results=results,
        headline=view.headline(results),
        legend=legend(results),
        notes=list(dict.fromkeys(row.note for row in results.rows if row.note)),
        cost=charts.cost_charts(results),
        task_rows=view.task_table(results),
        confusions=view.confusions(results),
        lights=view.LIGHTS,
        sheets=sheets,
        error=charts.error_chart(results),
        errors=view.error_table(results),
        residuals=charts.residual_chart(results),
        similarity=charts.similarity_chart(run.get("similarity", ())),
        refining=charts.refine_charts(run.get("refine", {})),
        barrier=charts.barrier_chart(results),
        plans=sorted(plans, key=lambda one: one[0] != own),
        owners=owners,
        timings=view.timings(run),
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
    return {
        "columns": columns(results),
        "rows": [cells(results, row) for row in results.rows],
        "notes": [row.note for row in results.rows],
        "legend": legend(results),
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
