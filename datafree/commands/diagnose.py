"""`datafree diagnose RECIPE`: how good the proxies are, before anything is merged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from torch import Tensor

from datafree.diagnosis.diagnose import SourceDiagnosis, diagnose
from datafree.diagnosis.ranking import Place, Scores, light, ranking
from datafree.errors import UsageError
from datafree.images.image_set import ImageSet, ImageSpec, load_images
from datafree.images.preprocess import match_channels
from datafree.progress import progress_on
from datafree.proxy.kinds.images import frame
from datafree.recipe.file import load_recipe
from datafree.seeds import derive_seed
from datafree.stages import (
    LoadedParents,
    Work,
    begin,
    exact_arithmetic,
    load_oracle,
    load_parents,
    load_tasks,
    make_proxies,
    refuse_leak,
    trace_parents,
)
from datafree.tables import output_width, text_table, wrapped
from datafree.text import json_text

ORACLE = "oracle"


def run(
    recipe: str, real: str | None, real_count: int, settings: Sequence[str], device: str, as_json: bool
) -> None:
    work = begin(load_recipe(recipe, settings), device, progress_on())
    with work.progress, exact_arithmetic():
        parents = load_parents(work)
        tasks = load_tasks(work, parents)
        networks = trace_parents(work, parents)
        compared = None
        if real is not None:
            chosen = real_images(work, parents, real, real_count)
            refuse_leak(work, "the real images", chosen.hashes(), tasks)
            compared = _pixels(chosen, parents)
        proxies = make_proxies(work, parents, tasks)
        with work.progress.stage("diagnosis"):
            found = diagnose(
                proxies,
                parents.each,
                networks,
                real=compared,
                batch=work.recipe.recipe.merge.batch,
                device=work.device,
                progress=work.progress,
            )
    notes = list(dict.fromkeys([*parents.notes, *proxies.notes, *work.progress.notes]))
    places = ranking([Scores.of(one) for one in found])
    if as_json:
        content = {
            "recipe": work.recipe.recipe.name,
            "real": None if compared is None else len(compared),
            "sources": [one.to_dict() | {"light": light(one.bn_log_var, one.spread)} for one in found],
            "ranking": [vars(place) for place in places],
            "notes": notes,
        }
        click.echo(json_text(content), nl=False)
        return
    click.echo(diagnosis_text(found, places))
    for note in notes:
        click.echo(wrapped(f"note: {note}", output_width()))


def real_images(work: Work, parents: LoadedParents, real: str, count: int) -> ImageSet:
    """At most `count` images of REF: `oracle`, a folder, or FILE.npz with `:KEY` where its images are not `x_test`."""
    if real == ORACLE:
        if work.recipe.recipe.oracle is None:
            raise UsageError(
                "--real oracle: the recipe has no oracle section: add one, or name a folder or an .npz file"
            )
        images = load_oracle(work, load_tasks(work, parents))
        assert images is not None
    else:
        path, key = real, "x_test"
        if ".npz:" in real:
            path, key = real.rsplit(":", 1)
        if path.endswith(".npz"):
            spec = ImageSpec(npz=path, x=key)
        else:
            spec = ImageSpec(folder=path, size=parents.input.size)
        images = load_images(spec, Path.cwd())
    if len(images) < 2:
        raise UsageError(f"--real {real}: {images.name} has {len(images)} image; give at least 2, better 64")
    generator = np.random.default_rng(derive_seed(work.seed, "real"))
    return images.select(np.sort(generator.permutation(len(images))[:count]))


def _pixels(images: ImageSet, parents: LoadedParents) -> Tensor:
    """uint8 (n, C, H, W) as the proxies are."""
    pixels = match_channels(images.batch(range(len(images))), parents.input.channels)
    return frame(pixels, parents.input.size)


# what is said -----------------------------------------------------------------------------------------------


def diagnosis_text(found: Sequence[SourceDiagnosis], places: Sequence[Place]) -> str:
    """Tables per source, per source and parent, and of the layers that stand out; then the order."""
    parts = [_sources(found), _parents(found), _layers(found)]
    if found[0].cover is not None:
        parts.insert(1, _real(found))
    parts.append(_order(places) if len(places) > 1 else _alone(found[0]))
    return "\n" + "\n\n".join(parts)


def _sources(found: Sequence[SourceDiagnosis]) -> str:
    rows = [
        [
            one.name,
            str(one.images),
            light(one.bn_log_var, one.spread),
            _number(one.bn_log_var, 3),
            f"{100 * one.spread:.0f}",
            f"{100 * one.effective_rank:.1f}",
            str(one.dead),
            f"{100 * one.stability:.1f}",
            "-" if one.agreement is None else f"{100 * one.agreement:.0f}",
            "-" if one.seconds_per_1000 is None else f"{one.seconds_per_1000:.1f}",
        ]
        for one in found
    ]
    return text_table(
        [
            "source", "images", "looks", "BN log-var", "spread %", "rank %", "dead", "stable %", "agree %",
            "s/1,000",
        ],
        rows,
        left=["looks"],
    )  # fmt: skip


def _real(found: Sequence[SourceDiagnosis]) -> str:
    rows = []
    for one in found:
        assert one.cover is not None
        assert one.matched_as_real is not None
        known = [(layer.excess, layer.layer) for layer in one.cover if layer.excess is not None]
        worst, where = max(known, default=(0.0, ""))
        rows.append(
            [
                one.name,
                _number(_mean([layer.cosine for layer in one.cover]), 3),
                _number(10 ** (one.log_coverage or 0.0), 1),
                _number(max(layer.coverage[2] for layer in one.cover), 0),
                f"{100 * _mean([excess for excess, _ in known]):.1f}" if known else "-",
                f"{100 * one.matched_as_real:.1f}",
                f"{where} ({100 * worst:+.0f} %)" if known else "too few real images",
            ]
        )
    columns = [
        "against real", "Gram cosine", "coverage 95 %", "at most", "excess error %", "matched alike %",
        "worst layer",
    ]  # fmt: skip
    return text_table(columns, rows, left=["worst layer"])


def _parents(found: Sequence[SourceDiagnosis]) -> str:
    rows = [
        [
            one.name,
            scores.observation.parent,
            _number(scores.observation.bn_mean, 3),
            _number(scores.observation.bn_log_var, 3),
            f"{scores.observation.entropy:.2f} of {scores.observation.entropy_limit:.2f}",
            f"{100 * scores.effective_rank:.1f}",
            str(scores.dead),
        ]
        for one in found
        for scores in one.parents
    ]
    return text_table(
        ["source", "parent", "BN mean", "BN log-var", "entropy", "rank %", "dead"], rows, left=["parent"]
    )


SHOWN = 3


def _layers(found: Sequence[SourceDiagnosis]) -> str:
    """The batch norms that are furthest from their statistics, per source and parent."""
    rows = []
    for one in found:
        for scores in one.parents:
            far = sorted(scores.observation.norms, key=lambda norm: -norm.log_var)[:SHOWN]
            low = sorted(scores.ranks, key=lambda rank: rank.effective / rank.size)[:SHOWN]
            rows.append(
                [
                    one.name,
                    scores.observation.parent,
                    ", ".join(f"{norm.layer} {norm.log_var:.2f}" for norm in far) or "-",
                    ", ".join(f"{rank.layer} {rank.effective:.0f}/{rank.size}" for rank in low),
                ]
            )
    return text_table(
        ["source", "parent", "furthest batch norms (log-var)", "lowest effective ranks"],
        rows,
        left=["parent", "furthest batch norms (log-var)", "lowest effective ranks"],
    )


def _order(places: Sequence[Place]) -> str:
    lines = ["should merge best first (--json has every layer):"]
    for number, place in enumerate(places, 1):
        said = f"  before the next: {place.ahead} - {place.why}" if place.ahead else ""
        lines.append(f"  {number}. {place.name}{said}")
    return "\n".join(lines)


def _alone(one: SourceDiagnosis) -> str:
    return (
        f"{one.name} looks {light(one.bn_log_var, one.spread)}, by the values that sources had on CIFAR ResNet-20s; "
        "list several sources to have them ranked (--json has every layer)"
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
