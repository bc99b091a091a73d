"""What the benchmarks share: pairs of parents from recipes, proxies, results as JSON and Markdown."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pleas
from datafree.environment import machine, versions
from datafree.evaluate import Columns, Evaluation, Task, evaluate, load_task, merged_columns, parent_columns
from datafree.models import Parent, load_parent
from datafree.proxy import ProxySet, ProxySpec, build_proxies
from datafree.recipe import RecipeFile, load_recipe
from datafree.store import cache_folder

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = PROJECT / "benchmarks" / "results"
CIFAR = "${DATAFREE_DATA}/data/cifar10.npz"
THUMBNAILS = "${DATAFREE_DATA}/data/imagenet_sample_64.npz"

SOURCES: dict[str, dict[str, Any]] = {
    "real": {"count": 500, "sources": [{"kind": "images", "images": {"npz": CIFAR, "x": "x_train"}}]},
    "inversion": {"count": 768, "sources": [{"kind": "inversion", "mode": "split"}]},
    "thumbnails": {"count": 384, "sources": [{"kind": "images", "images": {"npz": THUMBNAILS, "x": "x"}}]},
}


@dataclass(frozen=True)
class Pair:
    """Two parents of one input, and the tasks they are judged by, as a recipe names them."""

    recipe: RecipeFile
    a: Parent
    b: Parent
    tasks: tuple[Task, ...]
    device: torch.device

    @property
    def separate(self) -> bool:
        return self.recipe.recipe.labels == "separate"

    def settings(self, seed: int) -> pleas.MergeSettings:
        """The recipe's own settings with another seed."""
        return self.recipe.recipe.merge.settings(self.recipe.recipe.labels, seed)

    def example(self) -> Tensor:
        return torch.zeros(2, *self.a.preprocess.shape)

    def score(self, module: nn.Module, columns: Columns | None = None) -> Evaluation:
        """Score a network that answers for both parents."""
        if columns is None:
            columns = merged_columns(self.recipe.recipe.labels, self.a.outputs, self.b.outputs)
        return evaluate(module, self.tasks, self.a.preprocess, columns, device=self.device)

    def score_parent(self, parent: Parent) -> Evaluation:
        return self.score(
            parent.module, parent_columns(self.recipe.recipe.labels, parent.name, parent.outputs)
        )

    def score_average(self, module: nn.Module) -> Evaluation:
        """Score an average of all weights: its one head answers every task."""
        return self.score(module, dict.fromkeys(("a", "b", "both"), slice(0, self.a.outputs)))


class Inputs(Iterable[Tensor]):
    """Proxies as the parents take them, read batch by batch as often as asked; never all in memory."""

    def __init__(self, proxies: ProxySet, pair: Pair, batch: int = 64) -> None:
        self.proxies, self.pair, self.batch = proxies, pair, batch

    def __len__(self) -> int:
        return -(-len(self.proxies) // self.batch)

    def __iter__(self) -> Iterator[Tensor]:
        for images in self.proxies.batches(self.batch):
            yield self.pair.a.preprocess(images.to(self.pair.device))


def load_pair(name: str, device: str, changes: Sequence[str] = ()) -> Pair:
    """The pair of `recipes/NAME.yaml` with `key=value` changes, on `device`; both parents take the same input."""
    file = load_recipe(PROJECT / "recipes" / f"{name}.yaml", changes)
    parents = [load_parent(spec, key, file.base) for key, spec in file.recipe.parents]
    for parent in parents:
        parent.module.to(device)
    assert parents[0].preprocess == parents[1].preprocess
    tasks = tuple(load_task(task, file.base) for task in file.recipe.evaluate)
    return Pair(file, parents[0], parents[1], tasks, torch.device(device))


def proxies(pair: Pair, source: str, seed: int) -> ProxySet:
    """The proxy images of one of SOURCES, cached."""
    spec = ProxySpec.model_validate(SOURCES[source])
    parents = [pair.a, pair.b]
    return build_proxies(spec, parents, seed, cache_folder(), pair.recipe.base, device=str(pair.device))


def keep(name: str, rows: Sequence[dict[str, Any]], started: str) -> str:
    """RESULTS/NAME.json with every row and the circumstances, whole at any time; returns the command."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    command = f"python -m {started} {shlex.join(sys.argv[1:])}".strip()
    record = {"command": command, "machine": machine(), "versions": versions(), "rows": list(rows)}
    temporary = RESULTS / f".{name}.json"
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(RESULTS / f"{name}.json")
    return command


def write(name: str, rows: Sequence[dict[str, Any]], table: str, started: str) -> None:
    """RESULTS/NAME.json with every row and the circumstances, NAME.md with the table and the command."""
    command = keep(name, rows, started)
    (RESULTS / f"{name}.md").write_text(f"`{command}`\n\n{table}\n")
    print(f"\n{table}\n\nwritten: {RESULTS.relative_to(PROJECT) / name}.json and .md")


def percent(values: Sequence[float]) -> str:
    """Mean, and the standard deviation where there are several: 77.4 ± 0.6."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, first column to the left, the others to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|--:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
