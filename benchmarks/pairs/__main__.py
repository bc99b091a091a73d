"""What every group's parents, their ensemble and the plain average of their weights reach.

python -m benchmarks.pairs
python -m benchmarks.pairs mnist_usps halves
"""

from __future__ import annotations

from collections.abc import Mapping

import click
import torch

from benchmarks.common import markdown
from benchmarks.pairs import PAIRS, Ensemble, Group, accuracy, average, plain_average
from datafree.errors import DatafreeError


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(PAIRS)))
@click.option("--threads", default=1, show_default=True)
def main(names: tuple[str, ...], threads: int) -> None:
    """Check the facts of the groups NAMES, all if none is given; experts that are missing are trained."""
    torch.set_num_threads(threads)
    for name in names or PAIRS:
        try:
            print(f"\n{facts(PAIRS[name])}", flush=True)
        except DatafreeError as error:
            raise click.ClickException(f"group {name}: {error}") from error


def facts(group: Group) -> str:
    """A heading and a table, in percent: each network on each task."""
    scores = {
        parent.name: own_tasks(group, parent.name, accuracy(parent.module, group)) for parent in group.parents
    }
    scores["ensemble"] = accuracy(Ensemble(group), group)
    if len({parent.outputs for parent in group.parents}) == 1:
        scores["plain average"] = accuracy(plain_average(group), group)
    tasks = [task.name for task in group.tasks]
    keys = [*tasks, "joint"] if group.labels == "separate" else tasks
    rows = [
        [name, *(shown(found, key) for key in keys), f"{100 * average(found):.1f}"]
        for name, found in scores.items()
    ]
    size = sum(parameter.numel() for parameter in group.modules[0].parameters())
    images = ", ".join(f"{len(task.images):,} {task.name}" for task in group.tasks)
    heading = (
        f"**{group.name}**, {group.labels} labels, {size:,} parameters a parent; judged on {images}; "
        f"{len(group.real_images):,} real and {len(group.public_images):,} public images"
    )
    return f"{heading}\n\n{markdown(['network', *keys, 'average'], rows)}"


def own_tasks(group: Group, parent: str, scores: Mapping[str, float]) -> Mapping[str, float]:
    """With separate labels a parent has no answer to the others' tasks."""
    if group.labels == "shared":
        return scores
    return {task.name: scores[task.name] for task in group.tasks if task.expert == parent}


def shown(scores: Mapping[str, float], key: str) -> str:
    return f"{100 * scores[key]:.1f}" if key in scores else ""


if __name__ == "__main__":
    main()
