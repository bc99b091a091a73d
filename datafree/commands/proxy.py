"""`datafree proxy RECIPE -o DIR`: the proxies themselves, to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

import datafree
from datafree.diagnosis.observe import watch
from datafree.folders import MARK, check_output, new_folder
from datafree.progress import progress_on
from datafree.proxy import ProxySet, SourceReport, contact_sheet, export_folder
from datafree.recipe.file import load_recipe
from datafree.stages import LoadedParents, begin, exact_arithmetic, load_parents, load_tasks, make_proxies
from datafree.tables import output_width, text_table, wrapped
from datafree.text import json_text

STATISTICS, IMAGES = "metrics.json", "images"


def run(
    recipe: str,
    out: str,
    settings: Sequence[str],
    device: str,
    overwrite: bool,
    png: bool,
    shown: int,
    as_json: bool = False,
) -> None:
    work, folder = begin(load_recipe(recipe, settings), device, progress_on()), Path(out)
    check_output(folder, overwrite=overwrite)
    with work.progress, exact_arithmetic():
        parents = load_parents(work)
        proxies = make_proxies(work, parents, load_tasks(work, parents))
        with work.progress.stage("look"), new_folder(folder, overwrite=overwrite) as building:
            sources = [
                describe(proxies.source(number), report, parents, work.device)
                for number, report in enumerate(proxies.manifest)
            ]
            sheets = write_sheets(proxies, building, shown)
            notes = list(dict.fromkeys([*proxies.notes, *work.progress.notes]))
            content = {
                MARK: datafree.__version__,
                "name": work.recipe.recipe.name,
                "recipe": work.recipe.recipe.fingerprint(),
                "count": len(proxies),
                "size": list(proxies.size),
                "channels": proxies.channels,
                "fingerprint": proxies.fingerprint,
                "sources": sources,
                "notes": notes,
            }
            (building / STATISTICS).write_text(json_text(content), encoding="utf-8")
            if png:
                export_folder(proxies, building / IMAGES)
    if as_json:
        places = {
            "folder": str(folder),
            "sheets": [str(folder / name) for name in sheets],
            "statistics": str(folder / STATISTICS),
            "images": str(folder / IMAGES) if png else None,
        }
        click.echo(json_text({**places, **content}), nl=False)
        return
    click.echo(_table(sources))
    for note in proxies.notes:
        click.echo(wrapped(f"note: {note}", output_width()))
    click.echo(f"sheets      {', '.join(str(folder / name) for name in sheets)}")
    click.echo(f"statistics  {folder / STATISTICS}")
    if png:
        click.echo(f"images      {folder / IMAGES}")


def write_sheets(proxies: ProxySet, folder: Path, shown: int) -> list[str]:
    """One sheet per source and, for a mixture, one of the images in their order; returns the files' names."""
    kinds = [report.kind for report in proxies.manifest]
    sheets = {f"{number + 1}-{kind}.png": proxies.source(number) for number, kind in enumerate(kinds)}
    if len(kinds) > 1:
        sheets["all.png"] = proxies
    for name, images in sheets.items():
        contact_sheet(images, folder / name, count=shown)
    return list(sheets)


def describe(
    images: ProxySet, report: SourceReport, parents: LoadedParents, device: torch.device
) -> dict[str, Any]:
    """One source: what it cost, its pixels, and what the parents make of it."""
    seen = [watch(parent, images.batches(64), device).observation() for parent in parents.each]
    return {
        "kind": report.kind,
        "count": report.count,
        "spec": dict(report.spec),
        "seconds_per_1000": report.seconds_per_1000,
        "shards": report.shards,
        "made_now": report.made,
        "folder": report.folder,
        "facts": dict(report.facts),
        "pixels": pixel_statistics(images),
        "parents": {
            one.parent: {
                "bn_mean": one.bn_mean,
                "bn_log_var": one.bn_log_var,
                "entropy": one.entropy,
                "entropy_limit": one.entropy_limit,
                "predictions": one.predictions.bincount().tolist(),
            }
            for one in seen
        },
    }


def pixel_statistics(images: ProxySet) -> dict[str, Any]:
    """Mean and deviation per channel on [0, 1], the share of clipped pixels, and the mean step between neighbours."""
    total, square = torch.zeros(images.channels).double(), torch.zeros(images.channels).double()
    clipped, step, batches = 0.0, 0.0, 0
    for batch in images.batches(64):
        pixels = batch.double() / 255
        total += pixels.mean((2, 3)).sum(0)
        square += pixels.square().mean((2, 3)).sum(0)
        clipped += float(((batch == 0) | (batch == 255)).double().mean((1, 2, 3)).sum())
        step += float((pixels[..., 1:] - pixels[..., :-1]).abs().mean((1, 2, 3)).sum())
        batches += len(batch)
    mean = total / batches
    return {
        "mean": mean.tolist(),
        "std": (square / batches - mean.square()).clamp_min(0).sqrt().tolist(),
        "clipped": clipped / batches,
        "step": step / batches,
    }


def _table(sources: Sequence[dict[str, Any]]) -> str:
    rows = []
    for number, one in enumerate(sources, 1):
        pixels, parents = one["pixels"], one["parents"].values()
        distances = [parent["bn_log_var"] for parent in parents if parent["bn_log_var"] is not None]
        rows.append(
            [
                f"{number} {one['kind']}",
                str(one["count"]),
                f"{one['seconds_per_1000']:.1f}",
                f"{one['made_now']} of {one['shards']}",
                " ".join(f"{value:.2f}" for value in pixels["mean"]),
                " ".join(f"{value:.2f}" for value in pixels["std"]),
                f"{100 * pixels['clipped']:.1f}",
                f"{sum(distances) / len(distances):.3f}" if distances else "-",
            ]
        )
    columns = ["source", "images", "s/1,000", "shards made", "mean", "std", "clipped %", "BN log-var"]
    return "\n" + text_table(columns, rows)
