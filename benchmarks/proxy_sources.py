"""Which source of proxies merges how well, and which score of `datafree diagnose` says so beforehand.

python -m benchmarks.proxy_sources --pair cifar_resnet20 --seeds 0,1,2 --threads 1
python -m benchmarks.proxy_sources --pair quickstart --seeds 0,1,2 --threads 1

A cell is one source, number of images and seed, with every fraction apart. Results are written after every cell;
started again, the command goes on with the cells that are missing, or whose source means something else now.
`real` is the recipe's oracle, `inversion` and `diffusion` are the sources of these kinds that the recipe itself uses.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import click
import torch
from scipy.stats import spearmanr

import pleas
from benchmarks.common import RESULTS, THUMBNAILS, Pair, Row, build, keep, load_pair, markdown, percent, write
from datafree.diagnosis.diagnose import SourceDiagnosis, examine
from datafree.diagnosis.ranking import Scores, compare, ranking
from datafree.proxy import ProxySet, ProxySpec, check_proxies

GENERATORS = ("fractals", "leaves", "network", "fbm", "warp", "spectrum")
DEFAULT = (
    "real;thumbnails;inversion;diffusion;thumbnails + inversion;"
    "procedural;fractals;leaves;spectrum;gaussian noise"
)
Sources = dict[str, list[dict[str, Any]]]
STARTED = "benchmarks.proxy_sources"


def only(generator: str) -> dict[str, Any]:
    return {"kind": "procedural", "mix": {name: float(name == generator) for name in GENERATORS}}


def sources_of(pair: Pair) -> Sources:
    """Every source there is for the pair, by name."""
    recipe = pair.work.recipe.recipe
    own = [source.model_dump(mode="json", exclude_defaults=True) for source in recipe.proxy.sources]
    named: Sources = {}
    for source, spec in zip(own, recipe.proxy.sources, strict=True):
        named.setdefault(spec.model_dump()["kind"], []).append({**source, "kind": spec.model_dump()["kind"]})
    inversion = {**named.get("inversion", [{"kind": "inversion"}])[0], "share": 1.0}
    thumbnails = {"kind": "images", "images": {"npz": THUMBNAILS, "x": "x"}}
    found: Sources = {
        "inversion": [inversion],
        "inversion, joint": [{**inversion, "mode": "joint"}],
        "inversion from noise": [{**inversion, "start": "noise"}],
        "thumbnails": [thumbnails],
        "thumbnails + inversion": [{**thumbnails, "share": 0.5}, {**inversion, "share": 0.5}],
        "procedural": [{"kind": "procedural"}],
        **{generator: [only(generator)] for generator in GENERATORS},
        "inversion + procedural": [{**inversion, "share": 0.5}, {"kind": "procedural", "share": 0.5}],
        "gaussian noise": [{"kind": "noise"}],
        "uniform noise": [{"kind": "noise", "form": "uniform"}],
    }
    if "diffusion" in named:
        share = 1 / len(named["diffusion"])
        found["diffusion"] = [{**source, "share": share} for source in named["diffusion"]]
    if recipe.oracle is not None:
        images = recipe.oracle.images.model_dump(mode="json", exclude_defaults=True)
        found["real"] = [{"kind": "images", "images": images}]
    return found


@click.command()
@click.option("--pair", default="cifar_resnet20", show_default=True, help="A recipe's name.")
@click.option("--sources", default=DEFAULT, show_default=True, help="Names, divided by ';', or `all`.")
@click.option("--counts", default="64,256,1024", show_default=True, help="Numbers of images.")
@click.option("--apart", default="0,0.25,0.5", show_default=True, help="Fractions of every class kept apart.")
@click.option("--seeds", default="0", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--name", default=None, help="Of the result files.")
@click.option("--fresh", is_flag=True, help="Forget the cells of earlier runs.")
def main(
    pair: str,
    sources: str,
    counts: str,
    apart: str,
    seeds: str,
    device: str,
    threads: int,
    name: str | None,
    fresh: bool,
) -> None:
    """Merge one pair from every source and write benchmarks/results/NAME.json and .md."""
    torch.set_num_threads(threads)
    loaded, file = load_pair(pair, device), name or f"proxy_sources_{pair}"
    known = sources_of(loaded)
    chosen = list(known) if sources == "all" else [one for one in sources.split(";") if one in known]
    unknown = set(sources.split(";")) - {*known, *DEFAULT.split(";"), "all"}
    if unknown:
        raise click.UsageError(f"no source is called {', '.join(unknown)}; there are {', '.join(known)}")
    fractions = [float(part) for part in apart.split(",")]
    numbers = sorted(map(int, counts.split(",")))
    rows = [] if fresh else earlier(file, known)
    for source, seed in itertools.product(chosen, map(int, seeds.split(","))):
        missing = [number for number in numbers if not done(rows, source, number, seed, fractions)]
        for number, proxies in made(loaded, known[source], missing, seed):
            rows = [
                row for row in rows if (row["source"], row["count"], row["seed"]) != (source, number, seed)
            ]
            cell = {
                "source": source,
                "spec": known[source],
                "count": number,
                "seed": seed,
                "threads": threads,
            }
            rows += [cell | row for row in measure(loaded, proxies, seed, fractions)]
            keep(file, rows, STARTED)
            shown = ", ".join(
                f"{100 * row['average']:.1f} at {row['apart']:g}" for row in rows[-len(fractions) :]
            )
            print(
                f"{source}, {number} images, seed {seed}: {shown} ({rows[-1]['seconds_cell']:.0f} s)",
                flush=True,
            )
    order = [
        row for source in chosen for row in rows if row["source"] == source and row["apart"] in fractions
    ]
    order = [row for row in order if row["count"] in numbers]
    write(file, rows, report(order, fractions, loaded), STARTED)


def earlier(name: str, known: Sources) -> list[Row]:
    """The cells of an earlier run whose source still means the same; those of before decision 11 are made again."""
    try:
        rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    except FileNotFoundError:
        return []
    return [row for row in rows if known.get(row["source"]) == row["spec"] and "propagate" in row]


def done(rows: Sequence[Row], source: str, count: int, seed: int, fractions: Sequence[float]) -> bool:
    there = {
        row["apart"] for row in rows if (row["source"], row["count"], row["seed"]) == (source, count, seed)
    }
    return there >= set(fractions)


def made(
    pair: Pair, source: Sequence[Mapping[str, Any]], counts: Sequence[int], seed: int
) -> Iterator[tuple[int, ProxySet]]:
    """The proxies of every number of images; all there are where a source has fewer."""
    if not counts:
        return
    parents, base = pair.parents.each, pair.work.recipe.base
    limits = [
        bound.limit / spec.share
        for spec, bound, _ in check_proxies(
            ProxySpec.model_validate({"count": 1, "sources": source}), parents, seed, base
        )
        if bound.limit is not None
    ]
    most = int(min([counts[-1], *limits]))
    spec = ProxySpec.model_validate({"count": most, "sources": source})
    whole = build(pair, spec, seed)
    for count in counts:
        yield count, whole.prefix(min(count, most))


def measure(pair: Pair, proxies: ProxySet, seed: int, fractions: Sequence[float]) -> list[Row]:
    """The merges from one set of proxies, all from one collect, with what the diagnosis said of the set."""
    # 64 small images leave the ridge to decide
    networks = pair.networks(replace(pair.settings(seed), min_rows=0.0))
    started = time.perf_counter()
    found = examine("", proxies, pair.parents.each, networks, device=pair.work.device)
    seconds = time.perf_counter() - started
    made = [report.seconds_per_1000 * report.spec["share"] for report in proxies.manifest]
    scores = Scores.of(found.diagnosis)
    rows = []
    for fraction in fractions:
        result = pleas.assemble(found.evidence, pleas.make_plan(found.evidence, apart=fraction))
        scored = pair.score(result.module)
        rows.append(
            {
                "images": len(proxies),
                "apart": fraction,
                "ratio": result.ratio,
                "average": scored.average,
                "joint": scored.joint,
                "accuracy": {score.task: score.accuracy for score in scored.tasks},
                "residual": result.mean_residual,
                "propagate": result.propagate,
                "held_out_error": result.held_out_error,
                "scores": scores_of(found.diagnosis),
                "noise": dict(scores.noise),
                "seconds_per_1000": sum(made),
                "seconds_statistics": seconds,
            }
        )
    total = time.perf_counter() - started
    return [row | {"seconds_cell": total} for row in rows]


def scores_of(found: SourceDiagnosis) -> dict[str, float | None]:
    """What is known without any real image."""
    return {
        "spread of predictions": found.spread,
        "BN log-variance distance": found.bn_log_var,
        "BN mean distance": found.bn_mean,
        "effective rank": found.effective_rank,
        "dead directions": float(found.dead),
        "match stability": found.stability,
        "agreement": found.agreement,
    }


# What is written
# -----------------------------------------------------------------------------------------------------------


def report(rows: Sequence[Row], fractions: Sequence[float], pair: Pair) -> str:
    tables = [accuracies(rows, fractions, pair), rankings(rows, fractions)]
    if any(row["source"] == "real" for row in rows):
        tables.insert(1, distances(rows))
    return "\n\n".join([*tables, calibration(rows)])


Cell = tuple[str, int]


def cells_of(rows: Sequence[Row]) -> dict[Cell, list[Row]]:
    """The rows of every source and number of images, all seeds and fractions together."""
    found: dict[Cell, list[Row]] = {}
    for row in rows:
        found.setdefault((row["source"], row["count"]), []).append(row)
    return found


def accuracies(rows: Sequence[Row], fractions: Sequence[float], pair: Pair) -> str:
    """One line per source and number of images: accuracy in per cent per fraction apart, and the scores."""
    tasks = [task.name for task in pair.tasks]
    lines = []
    for (source, count), group in cells_of(rows).items():
        fewer = group[0]["images"]
        line = [source, str(count) if fewer == count else f"{count} (there are {fewer})"]
        for fraction in fractions:
            chosen = [row for row in group if row["apart"] == fraction]
            each = " / ".join(percent([statistics.mean(row["accuracy"][t] for row in chosen)]) for t in tasks)
            mean = percent([row["average"] for row in chosen])
            line.append(mean if len(tasks) == 1 else f"{mean} ({each})")
        for score in group[0]["scores"]:
            values = [row["scores"][score] for row in group]
            line.append("" if None in values else f"{statistics.mean(values):.3g}")
        line.append(f"{statistics.mean(row['seconds_per_1000'] for row in group):.1f}")
        lines.append(line)
    shown = "" if len(tasks) == 1 else f" ({' / '.join(tasks)})"
    header = ["source", "images", *(f"{fraction:g} apart{shown}" for fraction in fractions)]
    return markdown([*header, *rows[0]["scores"], "s per 1,000 images"], lines)


def distances(rows: Sequence[Row]) -> str:
    """How far the best source without data is from real data, at every number of images and fraction."""
    lines = []
    for count, apart in dict.fromkeys((row["count"], row["apart"]) for row in rows):
        means = means_of(rows, count, apart)
        others = {source: mean for source, mean in means.items() if source != "real"}
        if "real" in means and others:
            best = max(others, key=lambda source: others[source])
            gap = 100 * (others[best] - means["real"])
            lines.append(
                [
                    str(count),
                    f"{apart:g}",
                    percent([means["real"]]),
                    best,
                    percent([others[best]]),
                    f"{gap:+.1f}",
                ]
            )
    return markdown(["images", "apart", "real", "best without data", "accuracy", "difference"], lines)


def means_of(rows: Sequence[Row], count: int, apart: float) -> dict[str, float]:
    """Mean accuracy over seeds of every source."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if (row["count"], row["apart"]) == (count, apart):
            found.setdefault(row["source"], []).append(row["average"])
    return {source: statistics.mean(values) for source, values in found.items()}


def rankings(rows: Sequence[Row], fractions: Sequence[float]) -> str:
    """Spearman's correlation of every score with accuracy over the sources, at every number of images and fraction;
    scores and accuracies are means over seeds.
    """
    counts = sorted({row["count"] for row in rows})
    columns = list(itertools.product(counts, fractions))
    lines = []
    for score in [*rows[0]["scores"], "rank by `datafree diagnose`"]:
        line = [score]
        for count, apart in columns:
            means, told = means_of(rows, count, apart), told_by(score, rows, count)
            known = [source for source in means if source in told]
            found: Any = None
            if len(known) > 2 and len({told[source] for source in known}) > 1:
                found = spearmanr([told[source] for source in known], [means[source] for source in known])
            line.append("" if found is None else f"{found.statistic:+.2f}")
        lines.append(line)
    header = [f"{count} images, {apart:g} apart" for count, apart in columns]
    return markdown([f"Spearman over {len({row['source'] for row in rows})} sources", *header], lines)


def told_by(score: str, rows: Sequence[Row], count: int) -> dict[str, float]:
    """What a score says of every source, mean over seeds; the tool's own rank is negative, so that more is better."""
    values: dict[str, list[float]] = {}
    by_seed: dict[int, dict[str, Row]] = {}
    for row in rows:
        if row["count"] == count:
            by_seed.setdefault(row["seed"], {})[row["source"]] = row
    for group in by_seed.values():
        if score in next(iter(group.values()))["scores"]:
            told = {source: row["scores"][score] for source, row in group.items()}
        else:
            told = {place.name: -place.rank for place in ranking([rebuilt(row) for row in group.values()])}
        for source, value in told.items():
            if value is not None:
                values.setdefault(source, []).append(value)
    return {source: statistics.mean(found) for source, found in values.items()}


def rebuilt(row: Row) -> Scores:
    """The scores of a row as the ranking takes them."""
    scores = row["scores"]
    values = {"spread": scores["spread of predictions"], "bn_log_var": scores["BN log-variance distance"]}
    return Scores(row["source"], values, row["noise"])


def calibration(rows: Sequence[Row]) -> str:
    """How often the source that is ranked first of two merges better, by how sure the ranking said it is."""
    right: dict[str, list[float]] = {"sure": [], "likely": [], "open": []}
    for count, apart in dict.fromkeys((row["count"], row["apart"]) for row in rows):
        means = means_of(rows, count, apart)
        group = {row["source"]: rebuilt(row) for row in rows if row["count"] == count}  # of the last seed
        order = [place.name for place in ranking(list(group.values()))]
        for first, second in itertools.combinations(order, 2):
            certainty, _ = compare(group[first], group[second])
            right[certainty].append(float(means[first] > means[second]))
    lines = [
        [certainty, str(len(found)), percent([statistics.mean(found)]) if found else ""]
        for certainty, found in right.items()
    ]
    return markdown(["order of two sources", "pairs", "of which right (%)"], lines)


if __name__ == "__main__":
    main()
