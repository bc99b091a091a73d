"""What the benchmarks share: parents from recipes, proxies, runs that are found again, results as JSON and Markdown."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import pydantic
from torch import nn

import pleas
from datafree.cache.store import cache_folder
from datafree.environment import machine, versions
from datafree.errors import UsageError
from datafree.evaluation.evaluate import Columns, Evaluation, Labels, Task, evaluate, parent_columns
from datafree.models.parent import Parent
from datafree.proxy import ProxySet, ProxySpec, build_proxies
from datafree.recipe.file import RecipeFile, load_recipe
from datafree.stages import (
    AllParents,
    Inputs,
    LoadedParents,
    Work,
    begin,
    load_parents,
    load_tasks,
    proxy_inputs,
)
from pleas.comparators import Case
from pleas.comparators.averages import Permutation, PlainAverage
from pleas.settings import Heads
from pleas.symmetry import identity

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = PROJECT / "benchmarks" / "results"
RUNS = PROJECT / "runs"
CIFAR = "${DATAFREE_DATA}/data/cifar10.npz"
THUMBNAILS = "${DATAFREE_DATA}/data/imagenet_sample_64.npz"

SOURCES: dict[str, dict[str, Any]] = {
    "real": {"count": 500, "sources": [{"kind": "images", "images": {"npz": CIFAR, "x": "x_train"}}]},
    "inversion": {"count": 768, "sources": [{"kind": "inversion", "mode": "split"}]},
    "thumbnails": {"count": 384, "sources": [{"kind": "images", "images": {"npz": THUMBNAILS, "x": "x"}}]},
}
Row = dict[str, Any]


# parents ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """The parents of a recipe, two or more, and the tasks they are judged by."""

    work: Work
    parents: LoadedParents
    tasks: tuple[Task, ...]

    @property
    def labels(self) -> Labels:
        return self.work.recipe.recipe.labels

    @property
    def separate(self) -> bool:
        return self.labels == "separate"

    @property
    def outputs(self) -> dict[str, int]:
        """Outputs of every parent, by name."""
        return {parent.name: parent.outputs for parent in self.parents.each}

    @cached_property
    def symmetry(self) -> pleas.Symmetry:
        return pleas.trace(self.parents.first.module, self.parents.example)

    def settings(self, seed: int) -> pleas.MergeSettings:
        """The recipe's own settings with another seed."""
        recipe = self.work.recipe.recipe
        return recipe.merge.settings(recipe.labels, seed)

    def networks(
        self, settings: pleas.MergeSettings, modules: Sequence[nn.Module] | None = None
    ) -> pleas.Parents:
        """The parents as `pleas` takes them; modules: others of their architecture in their places."""
        given = modules or [parent.module for parent in self.parents.each]
        names = self.parents.names
        return pleas.Parents.of(given, self.parents.example, settings, names=names, symmetry=self.symmetry)

    def inputs(self, proxies: ProxySet) -> Inputs:
        """The proxies as every parent takes them, batch by batch, as often as asked; never all in memory."""
        return proxy_inputs(self.work, self.parents, proxies)

    def gather(self, settings: pleas.MergeSettings, proxies: ProxySet) -> pleas.Evidence:
        """Second moments of all units on the proxies, and the matching they give."""
        networks, inputs = self.networks(settings), self.inputs(proxies)
        statistics = pleas.collect(networks, inputs, images=inputs.count)
        return pleas.gather(networks, inputs, statistics=statistics)

    def averages(self, evidence: pleas.Evidence) -> dict[str, nn.Module]:
        """`plain average` and `permutation only` at 1.0x, batch norms re-estimated on the evidence's images."""
        case = Case(evidence, evidence.inputs)
        return {method.title: method()(case) for method in (PlainAverage, Permutation)}

    def score(self, module: nn.Module, columns: Columns | None = None) -> Evaluation:
        """Score a network that answers for all parents."""
        if columns is None:
            columns = self.parents.columns(self.labels)
        return evaluate(module, self.tasks, self.parents.input, columns, device=self.work.device)

    def score_parent(self, parent: Parent) -> Evaluation:
        columns = parent_columns(self.labels, parent.name, self.outputs)
        return evaluate(parent.module, self.tasks, parent.preprocess, columns, device=self.work.device)

    def score_ensemble(self) -> Evaluation:
        return self.score(AllParents(self.parents, self.labels))


def load_pair(name: str, device: str, changes: Sequence[str] = ()) -> Pair:
    """The parents of `recipes/NAME.yaml` with `key=value` changes; networks run on `device`.

    Raises click.UsageError for a recipe, a change or a device that cannot be used.
    """
    try:
        return pair_of(load_recipe(PROJECT / "recipes" / f"{name}.yaml", changes), device)
    except UsageError as error:
        raise click.UsageError(str(error)) from error


def pair_of(recipe: RecipeFile, device: str) -> Pair:
    work = begin(recipe, device)
    parents = load_parents(work)
    return Pair(work, parents, load_tasks(work, parents).tasks)


def proxies(pair: Pair, source: str, seed: int) -> ProxySet:
    """The proxy images of one of SOURCES, cached."""
    return build(pair, ProxySpec.model_validate(SOURCES[source]), seed)


def build(pair: Pair, spec: ProxySpec, seed: int) -> ProxySet:
    """The proxy images of `spec`, cached."""
    device, base = str(pair.work.device), pair.work.recipe.base
    return build_proxies(spec, pair.parents.each, seed, cache_folder(), base, device=device)


def unmatched(networks: pleas.Parents) -> pleas.Evidence:
    """Units as they come and no images at all: what the plain average of weights is made from."""
    orders = (identity(networks.symmetry),) * networks.count
    return pleas.Evidence(networks, (), pleas.Statistics({}), orders)


def plain_average(networks: pleas.Parents) -> pleas.MergeResult:
    """The mean of all parents' weights at 1.0x, unit by unit as they come."""
    evidence = unmatched(networks)
    return pleas.assemble(evidence, pleas.make_plan(evidence, budget=1.0), least_squares=False)


def changed_settings(changes: Sequence[str], heads: Heads, seed: int) -> pleas.MergeSettings:
    """MergeSettings with KEY=VALUE changes. Raises click.UsageError for what they do not have or cannot be."""
    known = sorted(set(pleas.MergeSettings.__dataclass_fields__) - {"heads", "seed"})
    chosen: dict[str, Any] = {"heads": heads, "seed": seed}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or key not in known:
            raise click.UsageError(f"{change}: give KEY=VALUE, with one of the keys {', '.join(known)}")
        chosen[key] = value
    try:
        return pydantic.TypeAdapter(pleas.MergeSettings).validate_python(chosen)
    except pydantic.ValidationError as error:
        raise click.UsageError(
            "; ".join(f"{one['loc'][0]} = {one['input']}: {one['msg']}" for one in error.errors())
        ) from error
    except pleas.InputError as error:
        raise click.UsageError(str(error)) from error


# results ----------------------------------------------------------------------------------------------------


class Notebook:
    """Rows of finished runs, one per line of runs/NAME.rows.jsonl, found again by what was run.

    A run is known by its settings, not by the code that made it: remove the file to begin anew.
    """

    def __init__(self, name: str) -> None:
        self._path = RUNS / f"{name}.rows.jsonl"

    @property
    def rows(self) -> list[Row]:
        """Read anew each time, for runs beside this one write there, too."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        return [json.loads(line) for line in lines]

    def row(self, run: Row, make: Callable[[], Row], line: Callable[[Row], str]) -> Row:
        """The row of a run, made and kept if it is not there. line: what to print of a new one"""
        for row in self.rows:
            if row["run"] == run:
                return row
        row = {"run": run, **make()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:  # a line at once, so that runs beside this one keep theirs
            file.write(json.dumps(row) + "\n")
        print(line(row), flush=True)
        return row


def keep(name: str, rows: Sequence[Row], started: str) -> str:
    """RESULTS/NAME.json with every row and the circumstances, whole at any time; returns the command."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    command = f"python -m {started} {shlex.join(sys.argv[1:])}".strip()
    record = {"command": command, "machine": machine(), "versions": versions(), "rows": list(rows)}
    temporary = RESULTS / f".{name}.json"
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(RESULTS / f"{name}.json")
    return command


def write(name: str, rows: Sequence[Row], table: str, started: str) -> None:
    """RESULTS/NAME.json with every row and the circumstances, NAME.md with the table and the command."""
    command = keep(name, rows, started)
    (RESULTS / f"{name}.md").write_text(f"`{command}`\n\n{table}\n")
    print(f"\n{table}\n\nwritten: {RESULTS / name}.json and .md")


def percent(values: Sequence[float]) -> str:
    """Mean, and the standard deviation where there are several: 77.4 ± 0.6."""
    return spread([100 * value for value in values], 1)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and the standard deviation where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, first column to the left, the others to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|--:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
