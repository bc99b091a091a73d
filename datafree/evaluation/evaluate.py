"""How good a network is on each task: a parent, the ensemble, a baseline or a merged model, all by the same
functions.

A task has labelled images and says which parent is its expert. A network's output columns are divided into
heads: with shared labels one head serves every task; with separate labels a task uses the head of its expert, in a
union of labels the outputs that its expert knows; and the joint accuracy asks for the right class among all labels.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
import torch
from torch import Tensor, nn

from datafree.errors import RunError, UsageError
from datafree.evaluation.measures import (
    MANY,
    bootstrap,
    calibration_error,
    negative_log_likelihood,
    relative_error,
    top_k,
)
from datafree.evaluation.scores import Evaluation, TaskScore
from datafree.images.image_set import ImageSet, ImageSpec, load_images
from datafree.images.preprocess import Preprocess
from datafree.spec import Spec

Labels = Literal["shared", "separate", "union"]
BOTH = "both"  # what older recipes say for all parents
EVERY = "every parent"  # the expert of a task that names none
Head = slice | list[int]  # output columns, in the order of a parent's outputs
Columns = Mapping[str, Head]  # expert, or EVERY -> the output columns that answer its tasks
Progress = Callable[[str, int, int], None]  # stage, done, total


class TaskSpec(Spec):
    """One task in a recipe.

    expert:       the name of the parent that was trained for it; absent (or "both") where all were. With separate
                  labels, or a union, it says which outputs answer
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


def merged_columns(
    labels: str, outputs: Mapping[str, int], places: Sequence[Sequence[int]] | None = None
) -> Columns:
    """Heads of a network that answers for all parents: a merged model or an ensemble.

    outputs: of each parent     places: with `labels: union`, for each parent the output that each of its own is
    """
    if labels == "union" and places is not None:
        return {name: list(own) for name, own in zip(outputs, places, strict=True)}
    if labels == "shared":
        return dict.fromkeys((*outputs, EVERY), slice(0, next(iter(outputs.values()))))
    ends = list(accumulate(outputs.values()))
    return {name: slice(end - size, end) for (name, size), end in zip(outputs.items(), ends, strict=True)}


def parent_columns(labels: str, name: str, outputs: Mapping[str, int]) -> Columns:
    """Heads of the parent `name` alone: with separate labels it has no answer to other parents' tasks."""
    names = (*outputs, EVERY) if labels == "shared" else (name,)
    return dict.fromkeys(names, slice(0, outputs[name]))


def places_of(head: Head) -> list[int]:
    """The output columns of a head, one for each of a parent's outputs."""
    return list(range(head.start, head.stop)) if isinstance(head, slice) else head


def head_of(task: Task, columns: Columns) -> Head | None:
    """The output columns that answer a task; None where there are none."""
    return columns.get(task.expert or EVERY)


def check_tasks(tasks: Sequence[Task], columns: Columns) -> None:
    """Raises UsageError where a task names a head that is not there, or a class the head does not have."""
    for task in tasks:
        head = head_of(task, columns)
        names = [name for name in columns if name != EVERY]
        if head is None and task.expert is None:
            raise UsageError(
                f"task {task.name}: where parents have labels of their own each task needs one parent's: say "
                f"`expert: {names[0]}` or another of {', '.join(names)}"
            )
        if head is None:
            close = difflib.get_close_matches(str(task.expert), names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the parents are {', '.join(names)}"
            raise UsageError(f"task {task.name}: expert {task.expert!r} is no parent; {hint}")
        size = len(places_of(head))
        if task.targets.max() >= size:
            raise UsageError(
                f"task {task.name}: label {int(task.targets.max())} (after label_offset) is beyond the "
                f"head's {size} "
                "outputs: choose images with keep_labels, or set label_offset"
            )


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

    def outputs(task: Task) -> Tensor:
        return predict(
            module, task.images, preprocess, batch_size=batch_size, device=device, progress=progress
        )

    return relative_to(parents or {}, evaluate_outputs(outputs, tasks, columns))


def evaluate_outputs(
    outputs: Callable[[Task], Tensor],
    tasks: Sequence[Task],
    columns: Columns,
    ensemble: Callable[[Task], Tensor] | None = None,
) -> Evaluation:
    """Score what a network gives for a task's images, (N, K), on the tasks for which `columns` has a head.

    ensemble: what all parents together give for them, where the error of the outputs is to be measured
    """
    scores: list[TaskScore] = []
    joint_right, joint_count = 0, 0
    heads = {tuple(places_of(head)) for head in columns.values()}
    for task in tasks:
        head = head_of(task, columns)
        if head is None:
            continue
        logits = outputs(task)
        if not logits.isfinite().all():
            raise RunError(
                f"task {task.name}: the network returned NaN or infinity; its weights or inputs overflowed"
            )
        wanted = None if ensemble is None else ensemble(task)
        comparable = wanted is not None and wanted.shape == logits.shape
        error = (
            relative_error(logits[:, head], wanted[:, head]) if wanted is not None and comparable else None
        )
        scores.append(_score(task, logits[:, head], error))
        if len(heads) > 1:
            joint_right += int((logits.argmax(1).numpy() == np.array(places_of(head))[task.targets]).sum())
            joint_count += len(task.targets)
    joint = joint_right / joint_count if joint_count else None
    return Evaluation(
        tasks=tuple(scores),
        average=float(np.mean([score.accuracy for score in scores])) if scores else None,
        joint=joint,
        interval=bootstrap({s.task: (s.accuracy, s.count) for s in scores}) if scores else None,
        joint_interval=None if joint is None else bootstrap({"joint": (joint, joint_count)}),
    )


def relative_to(parents: Mapping[str, Evaluation], found: Evaluation) -> Evaluation:
    """`found` with its agreement with every parent, and its accuracies as shares of the experts'."""

    def told(score: TaskScore) -> TaskScore:
        known = {name: one.score(score.task) for name, one in parents.items()}
        answers = {name: other for name, other in known.items() if other is not None}
        experts = [answers[score.expert]] if score.expert in answers else list(answers.values())
        best = max((other.accuracy for other in experts), default=0.0)
        return replace(
            score,
            agreement={
                n: float((score.predictions == other.predictions).mean()) for n, other in answers.items()
            },
            normalised=score.accuracy / best if best else None,
        )

    return replace(found, tasks=tuple(told(score) for score in found.tasks))


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
    with evaluating(module, device), torch.inference_mode():
        return torch.cat([module(batch).float().cpu() for batch in batches])


def _score(task: Task, logits: Tensor, error: float | None) -> TaskScore:
    """logits: (N, K) of the head that answers"""
    chosen, targets = logits.argmax(1).numpy(), torch.from_numpy(task.targets).long()
    right = chosen == task.targets
    per_class = {
        name: float(right[task.targets == target].mean()) for target, name in task.class_names().items()
    }
    worst, accuracy = min(per_class, key=per_class.__getitem__), float(right.mean())
    return TaskScore(
        task=task.name,
        expert=task.expert,
        count=len(chosen),
        accuracy=accuracy,
        interval=bootstrap({task.name: (accuracy, len(chosen))}),
        top5=top_k(logits, targets, 5) if logits.shape[1] >= MANY else None,
        nll=negative_log_likelihood(logits, targets),
        calibration=calibration_error(logits, targets),
        error=error,
        per_class=per_class,
        worst_class=(worst, per_class[worst]),
        predictions=chosen,
        targets=task.targets,
    )


@contextmanager
def evaluating(module: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Run `module` on `device` in evaluation mode; its modes and its home are restored."""
    training = {name: child.training for name, child in module.named_modules()}
    home = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device(device))
    module.to(device).eval()
    try:
        yield
    finally:
        module.to(home)
        for name, child in module.named_modules():
            child.training = training[name]
