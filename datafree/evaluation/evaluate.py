"""How good a network is on each task: a parent, the ensemble, a baseline or a merged model, all by the same
functions.

A task has labelled images and says which parent is its expert. A network's output columns are divided into
heads: with shared labels one head serves every task; with separate labels a task uses the head of its expert,
and the joint accuracy asks for the right class among the labels of all heads.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from torch import Tensor, nn

from datafree.errors import RunError, UsageError
from datafree.images.image_set import ImageSet, ImageSpec, load_images
from datafree.images.preprocess import Preprocess
from datafree.spec import Spec

Labels = Literal["shared", "separate"]
BOTH = "both"  # what older recipes say for all parents
EVERY = "every parent"  # the expert of a task that names none
Columns = Mapping[str, slice]  # expert, or EVERY -> the output columns that answer its tasks
Progress = Callable[[str, int, int], None]  # stage, done, total


class TaskSpec(Spec):
    """One task in a recipe.

    expert:       the name of the parent that was trained for it; absent (or "both") where all were. With separate
                  labels it says which head answers
    label_offset: taken off every label, where the images' labels 5, 6, ... are the head's outputs 0, 1, ...
    """

    name: str = pydantic.Field(min_length=1, max_length=100)
    expert: str | None = None
    images: ImageSpec
    label_offset: int = pydantic.Field(default=0, ge=0)


@dataclass(frozen=True)
class Task:
    """Labelled images. targets: int64 (N,), the right output for each image, counted inside its head."""

    name: str
    expert: str | None
    images: ImageSet
    targets: np.ndarray

    def class_names(self) -> dict[int, str]:
        """Target -> name, for the targets that occur."""
        labels = self.images.labels
        assert labels is not None
        pairs = {int(target): int(label) for target, label in zip(self.targets, labels, strict=True)}
        known = self.images.classes
        return {target: known[pairs[target]] if known else str(pairs[target]) for target in sorted(pairs)}


def load_task(spec: TaskSpec, base: Path, *, verify: bool = True) -> Task:
    """Raises UsageError, naming the task, for images without labels and for labels below `label_offset`."""
    images = load_images(spec.images, base, verify=verify)
    if images.labels is None:
        raise UsageError(
            f"task {spec.name}: {images.name} has no labels, so accuracy cannot be measured; use one "
            "subfolder per "
            "class, or an .npz with labels"
        )
    targets = images.labels - spec.label_offset
    if (targets < 0).any():
        raise UsageError(
            f"task {spec.name}: label_offset is {spec.label_offset} and the smallest label is "
            f"{images.labels.min()}: "
            "lower the offset, or choose images with keep_labels"
        )
    return Task(spec.name, None if spec.expert == BOTH else spec.expert, images, targets)


def merged_columns(labels: str, outputs: Mapping[str, int]) -> Columns:
    """Heads of a network that answers for all parents: a merged model or an ensemble. outputs: of each parent."""
    if labels == "shared":
        return dict.fromkeys((*outputs, EVERY), slice(0, next(iter(outputs.values()))))
    ends = list(accumulate(outputs.values()))
    return {name: slice(end - size, end) for (name, size), end in zip(outputs.items(), ends, strict=True)}


def parent_columns(labels: str, name: str, outputs: Mapping[str, int]) -> Columns:
    """Heads of the parent `name` alone: with separate labels it has no answer to other parents' tasks."""
    names = (*outputs, EVERY) if labels == "shared" else (name,)
    return dict.fromkeys(names, slice(0, outputs[name]))


def head_of(task: Task, columns: Columns) -> slice | None:
    """The output columns that answer a task; None where there are none."""
    return columns.get(task.expert or EVERY)


def check_tasks(tasks: Sequence[Task], columns: Columns) -> None:
    """Raises UsageError where a task names a head that is not there, or a class the head does not have."""
    for task in tasks:
        head = head_of(task, columns)
        names = [name for name in columns if name != EVERY]
        if head is None and task.expert is None:
            raise UsageError(
                f"task {task.name}: with separate labels each task needs the head of one parent: say "
                f"`expert: {names[0]}` or another of {', '.join(names)}"
            )
        if head is None:
            close = difflib.get_close_matches(str(task.expert), names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the parents are {', '.join(names)}"
            raise UsageError(f"task {task.name}: expert {task.expert!r} is no parent; {hint}")
        size = head.stop - head.start
        if task.targets.max() >= size:
            raise UsageError(
                f"task {task.name}: label {int(task.targets.max())} (after label_offset) is beyond the "
                f"head's {size} "
                "outputs: choose images with keep_labels, or set label_offset"
            )


@dataclass(frozen=True)
class TaskScore:
    """One network on one task. All numbers are fractions between 0 and 1.

    per_class:   class name -> accuracy         worst_class: (name, accuracy) of the lowest
    agreement:   parent -> share of images for which the network chooses the class that parent chooses
    predictions: int64 (N,), counted inside the head
    """

    task: str
    expert: str | None
    count: int
    accuracy: float
    per_class: Mapping[str, float]
    worst_class: tuple[str, float]
    agreement: Mapping[str, float] = field(default_factory=dict)
    predictions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), repr=False, compare=False)


@dataclass(frozen=True)
class Evaluation:
    """One network on every task it can answer.

    average: mean of the tasks' accuracies        joint: accuracy among the labels of all heads, images of
    all tasks pooled; None with shared labels and for a network with one head
    """

    tasks: tuple[TaskScore, ...]
    average: float | None
    joint: float | None = None

    def score(self, task: str) -> TaskScore | None:
        """The score on the task called `task`, None where the network has no head for it."""
        return next((score for score in self.tasks if score.task == task), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values, without the predictions."""
        tasks = {
            score.task: {
                "expert": score.expert,
                "count": score.count,
                "accuracy": score.accuracy,
                "per_class": dict(score.per_class),
                "worst_class": {"class": score.worst_class[0], "accuracy": score.worst_class[1]},
                "agreement": dict(score.agreement),
            }
            for score in self.tasks
        }
        return {"tasks": tasks, "average": self.average, "joint": self.joint}


def evaluate(
    module: nn.Module,
    tasks: Sequence[Task],
    preprocess: Preprocess,
    columns: Columns,
    *,
    parents: Mapping[str, Evaluation] | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Evaluation:
    """Score `module` on the tasks for which `columns` has a head.

    parents: evaluations of the parents on the same tasks, to measure agreement with them
    Raises RunError where the network returns NaN or infinity.
    """
    scores: list[TaskScore] = []
    joint_right, joint_count = 0, 0
    ends = sorted({(head.start, head.stop) for head in columns.values()})
    for task in tasks:
        head = head_of(task, columns)
        if head is None:
            continue
        logits = predict(
            module, task.images, preprocess, batch_size=batch_size, device=device, progress=progress
        )
        if not logits.isfinite().all():
            raise RunError(
                f"task {task.name}: the network returned NaN or infinity; its weights or inputs overflowed"
            )
        chosen = logits[:, head].argmax(1).numpy()
        scores.append(_score(task, chosen, parents or {}))
        if len(ends) > 1:
            joint_right += int((logits.argmax(1).numpy() == task.targets + head.start).sum())
            joint_count += len(task.targets)
    average = float(np.mean([score.accuracy for score in scores])) if scores else None
    return Evaluation(tuple(scores), average, joint_right / joint_count if joint_count else None)


def predict(
    module: nn.Module,
    images: ImageSet,
    preprocess: Preprocess,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Tensor:
    """Outputs of `module` for every image: float32 (N, K), on the CPU. The module is left as it was."""

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(images), batch_size):
            end = min(start + batch_size, len(images))
            yield preprocess(images.batch(range(start, end)).to(device))
            if progress is not None:
                progress(f"evaluating on {images.name}", end, len(images))

    return predict_batches(module, batches(), device=device)


def predict_batches(
    module: nn.Module, batches: Iterable[Tensor], *, device: torch.device | str = "cpu"
) -> Tensor:
    """Outputs of `module` for inputs that are on `device`: float32 (N, K), on the CPU. It is left as it was."""
    with _evaluating(module, device), torch.inference_mode():
        return torch.cat([module(batch).float().cpu() for batch in batches])


def _score(task: Task, chosen: np.ndarray, parents: Mapping[str, Evaluation]) -> TaskScore:
    right = chosen == task.targets
    names = task.class_names()
    per_class = {name: float(right[task.targets == target].mean()) for target, name in names.items()}
    worst = min(per_class, key=per_class.__getitem__)
    references = {name: evaluation.score(task.name) for name, evaluation in parents.items()}
    agreement = {name: float((chosen == ref.predictions).mean()) for name, ref in references.items() if ref}
    return TaskScore(
        task=task.name,
        expert=task.expert,
        count=len(chosen),
        accuracy=float(right.mean()),
        per_class=per_class,
        worst_class=(worst, per_class[worst]),
        agreement=agreement,
        predictions=chosen,
    )


@contextmanager
def _evaluating(module: nn.Module, device: torch.device | str) -> Iterator[None]:
    training = {name: child.training for name, child in module.named_modules()}
    home = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device(device))
    module.to(device).eval()
    try:
        yield
    finally:
        module.to(home)
        for name, child in module.named_modules():
            child.training = training[name]
