"""Every network on every task: the parents, the ensemble, the other methods, the merged networks, the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import pleas
from datafree.cache.store import Stage, content_hash
from datafree.errors import RunError
from datafree.evaluation.evaluate import (
    Columns,
    Evaluation,
    Labels,
    Task,
    TaskScore,
    evaluate_outputs,
    parent_columns,
    places_of,
    predict,
    predict_batches,
    relative_to,
)
from datafree.evaluation.fidelity import Fidelity, fidelity
from datafree.evaluation.latency import measure_latency
from datafree.evaluation.results import Kind, Point, Row
from datafree.images.preprocess import Preprocess
from datafree.stages.comparing import Compared
from datafree.stages.holding import HeldOut
from datafree.stages.inputs import EvaluationSet
from datafree.stages.merging import Merged
from datafree.stages.parents import LoadedParents
from datafree.stages.work import Work

TIMED = 8  # images of a forward pass that is timed
Curves = Mapping[Point, list[dict[str, float | None]]]  # seconds of refining, task average, joint accuracy


class AllParents(nn.Module):
    """The ensemble as a network of the merged network's input, whatever the parents' own normalisation."""

    def __init__(self, parents: LoadedParents, labels: Labels) -> None:
        super().__init__()
        modules = [parent.module for parent in parents.each]
        self.ensemble = pleas.Ensemble(*modules, heads=labels, outputs=parents.places)
        for number, parent in enumerate(parents.each):
            own, common = parent.preprocess, parents.input
            slope = torch.tensor(common.std) / torch.tensor(own.std)
            offset = (torch.tensor(common.mean) - torch.tensor(own.mean)) / torch.tensor(own.std)
            self.register_buffer(f"slope_{number}", slope.view(-1, 1, 1), persistent=False)
            self.register_buffer(f"offset_{number}", offset.view(-1, 1, 1), persistent=False)
        self.same, self.count = parents.same_input, len(parents.each)

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.ensemble(x)
            if self.same
            else self.ensemble(*(self._seen_by(p, x) for p in range(self.count)))
        )

    def _seen_by(self, number: int, x: Tensor) -> Tensor:
        return x * self.get_buffer(f"slope_{number}") + self.get_buffer(f"offset_{number}")


def evaluate_all(
    work: Work,
    parents: LoadedParents,
    tasks: EvaluationSet,
    compared: Sequence[Compared],
    merged: Sequence[Merged],
    refined: Sequence[Merged],
    oracles: Sequence[Merged],
    notes: Mapping[str, str],
    held: HeldOut,
) -> tuple[tuple[Row, ...], Curves]:
    """Every network on every task it can answer and on held-out proxies, and how refining got there.

    notes: what the reader must know of other methods, by name
    """
    with work.progress.stage("evaluation"):
        said = dict.fromkeys(text for one in merged for text in one.result.contradictions)
        judge, rows = Judge.with_parents(work, parents, tasks, ". ".join(said), held)
        rows += [
            judge.row(one.chosen.kind, one, name=one.name, note=notes.get(one.name, "")) for one in compared
        ]
        rows += [judge.row("merged", one.result, one.point) for one in merged]
        rows += [judge.row("refined", one.result, one.point, note=_verdict(one)) for one in refined]
        rows += [judge.row("oracle", one.result, one.point) for one in oracles]
        starts = {row.point: row.evaluation for row in rows if row.kind == "merged"}
        curves = {one.point: judge.curve(one, starts[one.point]) for one in refined if one.snapshots}
    return tuple(rows), curves


def _verdict(one: Merged) -> str:
    if one.refined is None:
        return f"{one.point.label}: it already computes what its parents do, so there was nothing to refine"
    if one.refined["kept"] == "start":
        return f"{one.point.label}: refining did not help on held-out proxies, least squares was kept"
    return ""


@dataclass(frozen=True)
class Judge:
    """Scores networks on the recipe's tasks, each once: the same network on the same images is found in the
    store.
    """

    work: Work
    parents: LoadedParents
    tasks: EvaluationSet
    parent_scores: Mapping[str, Evaluation]
    held: HeldOut | None = None
    logits: dict[str, Tensor] = field(
        default_factory=dict
    )  # the ensemble's by task, where they were asked for

    @classmethod
    def with_parents(
        cls,
        work: Work,
        parents: LoadedParents,
        tasks: EvaluationSet,
        note: str = "",
        held: HeldOut | None = None,
    ) -> tuple[Judge, list[Row]]:
        """A judge that knows what the parents answer, and the parents' own rows.

        note: what the reader must know of the ensemble
        held: proxies to compare networks on; without them rows have no fidelity
        """
        alone = cls(work, parents, tasks, {}, held)
        labels = work.recipe.recipe.labels
        scores, columns = {}, {}
        cost = pleas.flops(parents.first.module, parents.example)
        outputs = {parent.name: parent.outputs for parent in parents.each}
        for parent in parents.each:
            columns[parent.name] = parent_columns(labels, parent.name, outputs)
            scores[parent.name] = alone.score(parent.module, columns[parent.name], parent.preprocess)
        judge, rows = replace(alone, parent_scores=scores), []
        for parent in parents.each:
            close = judge.fidelity(parent.module, columns[parent.name], parent.preprocess)
            size, found = _parameters(parent.module), relative_to(scores, scores[parent.name])
            rows.append(Row("parent", parent.name, cost, 1.0, size, found, fidelity=close))
        together, count = judge.together, len(parents.each)
        evaluation = judge.score(together, judge.columns, parents.input)
        close = judge.fidelity(together, judge.columns, parents.input)
        rows.append(
            Row(
                "ensemble",
                "",
                count * cost,
                float(count),
                _parameters(together),
                evaluation,
                note=note,
                fidelity=close,
            )
        )
        return judge, rows

    @property
    def columns(self) -> Columns:
        """Heads of a network that answers for all parents."""
        return self.parents.columns(self.work.recipe.recipe.labels)

    def row(
        self,
        kind: Kind,
        result: pleas.MergeResult | Compared,
        point: Point | None = None,
        *,
        name: str = "",
        note: str = "",
    ) -> Row:
        evaluation = self.score(result.module, self.columns, self.parents.input)
        predicted = None
        if isinstance(result, pleas.MergeResult) and kind in ("merged", "oracle"):
            predicted = result.held_out_error
        close = self.fidelity(result.module, self.columns, self.parents.input)
        size = result.parameters
        return Row(kind, name, result.flops, result.ratio, size, evaluation, point, note, predicted, close)

    def curve(self, one: Merged, start: Evaluation) -> list[dict[str, float | None]]:
        """Accuracy of a network against seconds of refining, from what was kept of it on the way."""
        looks = [(0.0, start)]
        for taken in one.snapshots:
            looks.append((taken.seconds, self.score(taken.module, self.columns, self.parents.input)))
        return [{"seconds": at, "average": found.average, "joint": found.joint} for at, found in looks]

    def score(self, module: nn.Module, columns: Columns, preprocess: Preprocess) -> Evaluation:
        """As `evaluate`, from the store where this network met these images before."""
        meaning = {**self._meaning(module, columns, preprocess), "tasks": self.tasks.fingerprint}

        def outputs(task: Task) -> Tensor:
            return self._on_task(module, preprocess, task)

        def make() -> Stage:
            own = self._ensemble_on if isinstance(module, AllParents) else outputs
            found = evaluate_outputs(own, self.tasks.tasks, columns, self._ensemble_on)
            predictions = {score.task: torch.from_numpy(score.predictions) for score in found.tasks}
            return Stage(predictions, found.to_dict())

        found = _evaluation(self.work.finished("evaluation", meaning, make), self.tasks)
        return relative_to(self.parent_scores, found)

    @cached_property
    def together(self) -> AllParents:
        """The ensemble."""
        return AllParents(self.parents, self.work.recipe.recipe.labels)

    def _ensemble_on(self, task: Task) -> Tensor:
        if task.name not in self.logits:
            self.logits[task.name] = self._on_task(self.together, self.parents.input, task)
        return self.logits[task.name]

    def _on_task(self, module: nn.Module, preprocess: Preprocess, task: Task) -> Tensor:
        device = self.work.device
        return predict(module, task.images, preprocess, device=device, progress=self.work.progress)

    def fidelity(self, module: nn.Module, columns: Columns, preprocess: Preprocess) -> Fidelity | None:
        """How close a network is to its parents on held-out proxies; None where the judge has none."""
        held = self.held
        if held is None:
            return None
        meaning = {**self._meaning(module, columns, preprocess), "held out": held.fingerprint}

        def make() -> Stage:
            outputs = self._predict(module, preprocess)
            return Stage({}, fidelity(outputs, self._answers, columns, self._target, held.owners).to_dict())

        return Fidelity(**self.work.finished("fidelity", meaning, make).value)

    @cached_property
    def _answers(self) -> dict[str, Tensor]:
        return {each.name: self._predict(each.module, each.preprocess) for each in self.parents.each}

    @property
    def _target(self) -> Tensor:
        answers, labels = list(self._answers.values()), self.work.recipe.recipe.labels
        if labels == "union":
            return self._predict(self.together, self.parents.input)
        return torch.cat(answers, 1) if labels == "separate" else torch.stack(answers).mean(0)

    def _predict(self, module: nn.Module, preprocess: Preprocess) -> Tensor:
        """Outputs for the held-out proxies. Raises RunError where they are not finite."""
        assert self.held is not None
        batches = (preprocess(images.to(self.work.device)) for images in self.held.images.split(256))
        outputs = predict_batches(module, batches, device=self.work.device)
        if not outputs.isfinite().all():
            raise RunError("a network returned NaN or infinity on held-out proxies; its weights overflowed")
        return outputs

    def _meaning(self, module: nn.Module, columns: Columns, preprocess: Preprocess) -> dict[str, Any]:
        return {
            "state": content_hash(module.state_dict()),
            "network": pleas.program_config(module)
            or f"{type(module).__module__}.{type(module).__qualname__}",
            "parents": self.parents.fingerprint,
            "columns": {name: places_of(head) for name, head in columns.items()},
            "preprocess": preprocess.to_dict(),
            "device": self.work.device.type,
            "torch": torch.__version__,
        }


def _evaluation(stage: Stage, tasks: EvaluationSet) -> Evaluation:
    targets, value = {task.name: task.targets for task in tasks.tasks}, stage.value
    scores = tuple(
        TaskScore.from_dict(task, told, stage.tensors[task].numpy(), targets[task])
        for task, told in value["tasks"].items()
    )
    intervals = [value[key] and tuple(value[key]) for key in ("interval", "joint_interval")]
    return Evaluation(scores, value["average"], value["joint"], *intervals)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def time_networks(work: Work, parents: LoadedParents, ours: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The latency of the networks of a run beside one parent and the ensemble."""
    images = torch.zeros(TIMED, *parents.input.shape)
    together = AllParents(parents, work.recipe.recipe.labels)
    networks = {f"parent {parents.first.name}": parents.first.module, "ensemble": together, **ours}
    with work.progress.stage("latency"):
        return measure_latency(networks, images, device=work.device).to_dict()
