"""A group of networks that are to become one, the tasks that judge it, and the images it may see.

All images are uint8 (N, C, H, W). Heads of a network that answers for every parent stand side by side, in the order of
the parents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from datafree.errors import UsageError
from datafree.evaluation.evaluate import predict
from datafree.images.image_set import ImageSet
from datafree.images.preprocess import Preprocess
from datafree.models.parent import Parent

Labels = Literal["shared", "separate"]
JOINT = "joint"  # the key of the accuracy among the outputs of all heads


class Task(NamedTuple):
    """Labelled test images.

    images: uint8 (N, C, H, W)    labels: int64 (N,), counted inside the expert's head
    expert: the parent that was trained for it; None where every parent was
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    expert: str | None


@dataclass(frozen=True)
class Group:
    """How to get the parents and images; each is loaded, or trained, when first asked for and then kept.

    labels:       shared: all parents predict the same classes; separate: one head per parent
    load_parents: parent's name -> a function from that name to the parent
    load_real:    images of the parents' own training domains, every domain as often: for comparison only
    load_public:  photographs that anybody has, none of which is evaluated: allowed as proxies
    load_base:    the network that all parents were fine-tuned from, where there is one; its head may be another
    """

    name: str
    labels: Labels
    load_parents: Mapping[str, Callable[[str], Parent]]
    load_tasks: tuple[Callable[[], Task], ...]
    load_real: Callable[[], np.ndarray]
    load_public: Callable[[], np.ndarray]
    load_base: Callable[[str], Parent] | None = None

    @cached_property
    def parents(self) -> tuple[Parent, ...]:
        """Frozen and in evaluation mode; `name`, `module`, `preprocess` and `outputs` matter here."""
        parents = tuple(load(name) for name, load in self.load_parents.items())
        assert all(parent.preprocess == parents[0].preprocess for parent in parents)
        return parents

    @cached_property
    def base(self) -> nn.Module | None:
        """As `pleas.Parents.of(..., base=)` takes it."""
        return None if self.load_base is None else self.load_base("base").module

    @property
    def modules(self) -> list[nn.Module]:
        return [parent.module for parent in self.parents]

    @property
    def preprocess(self) -> Preprocess:
        return self.parents[0].preprocess

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(load() for load in self.load_tasks)

    @cached_property
    def real_images(self) -> np.ndarray:
        return self.load_real()

    @cached_property
    def public_images(self) -> np.ndarray:
        return self.load_public()

    @property
    def heads(self) -> dict[str, slice]:
        """Parent's name -> its columns in the output of a network that answers for all."""
        if self.labels == "shared":
            return {parent.name: slice(0, parent.outputs) for parent in self.parents}
        ends = list(accumulate(parent.outputs for parent in self.parents))
        starts = [0, *ends[:-1]]
        names = [parent.name for parent in self.parents]
        return {name: slice(*ends) for name, *ends in zip(names, starts, ends, strict=True)}

    def example(self) -> Tensor:
        """Two inputs, all zero, to trace with."""
        return torch.zeros(2, *self.preprocess.shape)

    def inputs(self, images: np.ndarray, batch: int = 64) -> list[Tensor]:
        """uint8 (N, C, H, W) as the parents take them: float32 (batch, channels, height, width), the last shorter."""
        pixels = torch.from_numpy(images)
        return [self.preprocess(part) for part in pixels.split(batch)]


class Ensemble(nn.Module):
    """All parents side by side: the mean of their logits, or with separate labels all of them in a row."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.parents = nn.ModuleList(group.modules)
        self.separate = group.labels == "separate"

    def forward(self, x: Tensor) -> Tensor:
        outputs = [parent(x) for parent in self.parents]
        return torch.cat(outputs, -1) if self.separate else torch.stack(outputs).mean(0)


def plain_average(group: Group) -> nn.Module:
    """The mean of all parents' weights, unit by unit as they come; separate labels leave it one head.

    Raises UsageError where the parents' heads differ in size.
    """
    if len({parent.outputs for parent in group.parents}) > 1:
        found = ", ".join(f"{parent.name} {parent.outputs}" for parent in group.parents)
        raise UsageError(
            f"group {group.name}: heads of different sizes have no average ({found}): average the parents without them"
        )
    merged = copy.deepcopy(group.modules[0])
    states = [module.state_dict() for module in group.modules]
    mean = {
        name: torch.stack([state[name] for state in states]).mean(0) if value.is_floating_point() else value
        for name, value in states[0].items()
    }
    merged.load_state_dict(mean)
    return merged.eval()


def accuracy(module: nn.Module, group: Group) -> dict[str, float]:
    """Top-1 between 0 and 1, by task; with all heads of separate labels also `joint`, over all tasks' images.

    A module with one head only (a parent, a plain average) answers every task by it. It is left as it was.
    Raises UsageError for an output that is neither one head nor all of them.
    """
    scores, right, count = {}, 0, 0
    home = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    for task in group.tasks:
        logits = predict(module, ImageSet(task.name, task.images), group.preprocess, device=home)
        head = _head(group, task, logits.shape[1])
        chosen = logits[:, head].argmax(1).numpy()
        scores[task.name] = float((chosen == task.labels).mean())
        if logits.shape[1] > head.stop - head.start:
            right += int((logits.argmax(1).numpy() == task.labels + head.start).sum())
            count += len(task.labels)
    return scores | ({JOINT: right / count} if count else {})


def average(scores: Mapping[str, float]) -> float:
    """Mean over tasks of what `accuracy` gave."""
    tasks = [score for name, score in scores.items() if name != JOINT]
    return sum(tasks) / len(tasks)


def _head(group: Group, task: Task, outputs: int) -> slice:
    """The columns that answer a task."""
    heads = group.heads
    sizes, whole = (
        {head.stop - head.start for head in heads.values()},
        max(head.stop for head in heads.values()),
    )
    if group.labels == "separate" and outputs == whole:
        assert task.expert is not None, f"{group.name}, {task.name}: separate labels need an expert"
        return heads[task.expert]
    if outputs in sizes:
        return slice(0, outputs)
    wanted = " or ".join(map(str, sorted({*sizes, whole})))
    raise UsageError(
        f"group {group.name}: the network returns {outputs} numbers per image and {wanted} are needed, one head or "
        "those of all parents side by side"
    )
