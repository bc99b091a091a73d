"""What solving layers on the merged network's own inputs gives, group by group and budget by budget.

    python -m benchmarks.propagate --groups resnet20,halves --images inverted --count 1024 --seeds 0,1,2
    python -m benchmarks.propagate --groups resnet20 --images real --set propagate=0.7 ridge=1e-2 --name fixed

Images: `inverted` out of the parents' batch norms (the defaults of `kind: inversion`), `real` ones of the domains they
were trained on, or `public` photographs. Every seed makes or chooses its own, and the positions that rows come from.
Every finished run is a line of runs/NAME.rows.jsonl and is not made again; remove the file to begin anew.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

import pleas
from benchmarks.common import PROJECT, Notebook, Row, changed_settings, markdown, percent, spread, write
from benchmarks.pairs import PAIRS, Ensemble, Group, accuracy, average
from benchmarks.pairs.group import JOINT
from datafree.cache.store import cache_folder
from datafree.errors import DatafreeError, UsageError
from datafree.proxy import ProxySpec, build_proxies
from datafree.seeds import derive_seed
from datafree.stages import choose_device
from pleas.baselines import has_batch_norm
from pleas.errors import PleasError

IMAGES = ("inverted", "real", "public")
REFERENCES, PERMUTED, MERGED = "references", "permutation only", "merged"


def several(kind: type) -> Any:
    """The callback of an option whose values are separated by commas."""

    def split(_: click.Context, option: click.Parameter, text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError as error:
            raise click.BadParameter(f"{text}: {error}", param=option) from error

    return split


@click.command()
@click.option("--groups", default="resnet20,halves", show_default=True, help="Of benchmarks.pairs.")
@click.option("--images", default="inverted", show_default=True, type=click.Choice(IMAGES))
@click.option("--count", default=1024, show_default=True, type=click.IntRange(min=2), help="Images.")
@click.option("--budgets", default="1,1.25,1.5", show_default=True, callback=several(float))
@click.option("--seeds", default="0,1,2", show_default=True, callback=several(int))
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change pleas.MergeSettings.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--name", default="propagate", show_default=True, help="Of the rows and the result files.")
@click.argument("more", nargs=-1, metavar="[KEY=VALUE]...")
def main(
    groups: str,
    images: str,
    count: int,
    budgets: Sequence[float],
    seeds: Sequence[int],
    changes: Sequence[str],
    device: str,
    threads: int,
    name: str,
    more: Sequence[str],
) -> None:
    """Merge GROUPS and write benchmarks/results/NAME.json and .md.

    More KEY=VALUE are as if each had --set before it.
    """
    torch.set_num_threads(threads)
    changes = [*changes, *more]
    changed_settings(changes, "shared", 0)  # a mistake is found before any work
    strange = [group for group in groups.split(",") if group not in PAIRS]
    if strange:
        raise click.BadParameter(f"{', '.join(strange)}: known are {', '.join(PAIRS)}", param_hint="--groups")
    book, rows = Notebook(name), []
    try:
        for group in groups.split(","):
            rows += measured(book, PAIRS[group], images, count, budgets, seeds, changes, device)
    except (DatafreeError, PleasError) as error:
        mistake = isinstance(error, UsageError | pleas.InputError)
        raise (click.UsageError if mistake else click.ClickException)(str(error)) from error
    write(name, rows, table(rows), "benchmarks.propagate")


def measured(
    book: Notebook,
    group: Group,
    images: str,
    count: int,
    budgets: Sequence[float],
    seeds: Sequence[int],
    changes: Sequence[str],
    device: str,
) -> list[Row]:
    """The rows of one group, from the notebook where they are there."""
    rows = [book.row({"group": group.name, "method": REFERENCES}, lambda: references(group), told)]
    for seed in seeds:
        settings = changed_settings(changes, group.labels, seed)
        case = Case(group, images, count, settings, choose_device(device))
        known = {"group": group.name, "images": images, "count": count, "settings": asdict(settings)}
        rows.append(book.row({**known, "method": PERMUTED, "budget": 1.0}, case.permuted, told))
        for budget in budgets:
            run = {**known, "method": MERGED, "budget": budget}
            rows.append(book.row(run, lambda case=case, budget=budget: case.merged(budget), told))
    return rows


def references(group: Group) -> Row:
    """Every task by its expert (by all parents where it has none), and the ensemble."""
    scores = {parent.name: accuracy(parent.module, group) for parent in group.parents}
    own = []
    for task in group.tasks:
        experts = list(scores) if task.expert is None else [task.expert]
        own.append(sum(scores[name][task.name] for name in experts) / len(experts))
    return {"parents": sum(own) / len(own), "each": scores, **judged(Ensemble(group), group)}


def judged(network: nn.Module, group: Group) -> Row:
    found = accuracy(network, group)
    return {"average": average(found), "joint": found.get(JOINT), "accuracy": found}


@dataclass(frozen=True)
class Batches:
    """uint8 (N, C, H, W) as the parents take them, batch by batch on `device`, as often as asked."""

    pixels: np.ndarray
    group: Group
    device: torch.device
    size: int = 64

    def __len__(self) -> int:
        return -(-len(self.pixels) // self.size)

    def __iter__(self) -> Iterator[Tensor]:
        for part in torch.from_numpy(self.pixels).split(self.size):
            yield self.group.preprocess(part.to(self.device))


@dataclass(frozen=True)
class Case:
    """One group, its images and the settings of a merge; what several merges share is made when first asked for."""

    group: Group
    images: str
    count: int
    settings: pleas.MergeSettings
    device: torch.device

    @cached_property
    def inputs(self) -> Batches:
        return Batches(self._pixels(), self.group, self.device)

    @cached_property
    def gathered(self) -> tuple[pleas.Evidence, float]:
        """The evidence, and the seconds it took; neither tracing nor making the images counts."""
        names = [parent.name for parent in self.group.parents]
        networks = pleas.Parents.of(self.group.modules, self.group.example(), self.settings, names=names)
        inputs, started = self.inputs, time.perf_counter()
        statistics = pleas.collect(networks, inputs, images=self.count)
        return pleas.gather(networks, inputs, statistics=statistics), time.perf_counter() - started

    def permuted(self) -> Row:
        """The mean of matched weights at 1.0x, batch norms re-estimated on the same images."""
        evidence, seconds = self.gathered
        plan = pleas.make_plan(evidence, budget=1.0)
        result = pleas.assemble(evidence, plan, least_squares=False)
        if has_batch_norm(evidence.parents.symmetry):
            moved = copy.deepcopy(result.module).to(self.device)
            result = replace(result, module=pleas.reestimate_bn(moved, self.inputs))
        return {**self._told(result), "seconds": {"gather": seconds}}

    def merged(self, budget: float) -> Row:
        evidence, seconds = self.gathered
        started = time.perf_counter()
        plan = pleas.make_plan(evidence, budget=budget)
        planned = time.perf_counter()
        result = pleas.assemble(evidence, plan)
        times = {"gather": seconds, "plan": planned - started, "solve": time.perf_counter() - planned}
        return {**self._told(result), "seconds": times}

    def _told(self, result: pleas.MergeResult) -> Row:
        return {
            "propagate": result.propagate,
            "targets": result.targets,
            "held_out_error": result.held_out_error,
            "tried": [[value, error] for value, error in result.tried.items()],
            "ratio": result.ratio,
            **judged(result.module.to(self.device), self.group),
        }

    def _pixels(self) -> np.ndarray:
        """uint8 (count, C, H, W): made by this seed, or chosen by it. Raises UsageError where there are too few."""
        if self.images == "inverted":
            spec = ProxySpec.model_validate({"count": self.count, "sources": [{"kind": "inversion"}]})
            made = build_proxies(
                spec,
                self.group.parents,
                self.settings.seed,
                cache_folder(),
                PROJECT,
                device=str(self.device),
            )
            return torch.cat(list(made.batches(256))).numpy()
        there = self.group.real_images if self.images == "real" else self.group.public_images
        if len(there) < self.count:
            raise UsageError(
                f"group {self.group.name} has {len(there)} {self.images} images and {self.count} are asked for: "
                "lower --count"
            )
        seed = derive_seed(self.settings.seed, "propagate", self.images)
        return there[np.random.default_rng(seed).permutation(len(there))[: self.count]]


# What is written
# -----------------------------------------------------------------------------------------------------------


def told(row: Row) -> str:
    """A finished run in one line."""
    run = row["run"]
    if run["method"] == REFERENCES:
        return f"{run['group']}: parents {100 * row['parents']:.1f} %, ensemble {100 * row['average']:.1f} %"
    what = f"{run['group']}, {run['images']}, {run['budget']:g}x, seed {run['settings']['seed']}, {run['method']}"
    solved = ""
    if row["propagate"] is not None:
        solved = f", held-out error {row['held_out_error']:.3f} at t = {row['propagate']:g}"
    return f"{what}: {100 * row['average']:.1f} %{solved}"


def table(rows: Sequence[Row]) -> str:
    """One line per group, method and budget; mean and standard deviation over seeds."""
    tops = {row["run"]["group"]: row for row in rows if row["run"]["method"] == REFERENCES}
    cells: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        run = row["run"]
        if run["method"] != REFERENCES:
            cells.setdefault((run["group"], run["method"], run["budget"]), []).append(row)
    lines = []
    for (group, method, budget), found in cells.items():
        run, top = found[0]["run"], tops[group]
        errors = known(row["held_out_error"] for row in found)
        joint, solve = (
            known(row["joint"] for row in found),
            known(row["seconds"].get("solve") for row in found),
        )
        chosen = [f"{value:g}" for value in known(row["propagate"] for row in found)]
        lines.append(
            [
                group,
                f"{run['count']} {run['images']}",
                f"{budget:g}x" if method == MERGED else method,
                chosen[0] if len(set(chosen)) == 1 else " / ".join(chosen),
                spread(errors, 3) if errors else "",
                percent([row["average"] for row in found]),
                percent(joint) if joint else "",
                percent([top["parents"]]),
                percent([top["average"]]) + ("" if top["joint"] is None else f" ({100 * top['joint']:.1f})"),
                spread([row["seconds"]["gather"] for row in found], 1),
                spread(solve, 1) if solve else "",
            ]
        )
    header = ["group", "images", "budget", "t chosen", "held-out error", "top-1 average (%)", "joint (%)"]
    header += ["parents (%)", "ensemble (joint, %)", "gather (s)", "solve (s)"]
    return markdown(header, lines)


def known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


if __name__ == "__main__":
    main()
