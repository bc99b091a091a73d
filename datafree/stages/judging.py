"""Every network on every task: the parents, the ensemble, the baselines, the merged networks, the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import pleas
from datafree.evaluate import Columns, Evaluation, TaskScore, evaluate, merged_columns, parent_columns
from datafree.preprocess import Preprocess
from datafree.results import Point, Row
from datafree.stages.inputs import EvaluationSet
from datafree.stages.merging import Merged
from datafree.stages.parents import Parents
from datafree.stages.work import Work
from datafree.store import Stage, content_hash

Curves = Mapping[Point, list[dict[str, float | None]]]  # seconds of refining, task average, joint accuracy


class BothParents(nn.Module):
    """The ensemble as a network of the merged network's input, whatever the parents' own normalisation."""

    def __init__(self, parents: Parents, labels: str) -> None:
        super().__init__()
        self.ensemble = pleas.Ensemble(parents.a.module, parents.b.module, labels)
        for name, parent in (("a", parents.a), ("b", parents.b)):
            own, common = parent.preprocess, parents.input
            slope = torch.tensor(common.std) / torch.tensor(own.std)
            offset = (torch.tensor(common.mean) - torch.tensor(own.mean)) / torch.tensor(own.std)
            self.register_buffer(f"slope_{name}", slope.view(-1, 1, 1), persistent=False)
            self.register_buffer(f"offset_{name}", offset.view(-1, 1, 1), persistent=False)
        self.same = parents.a.preprocess == parents.b.preprocess

    def forward(self, x: Tensor) -> Tensor:
        return self.ensemble(x) if self.same else self.ensemble(self._seen_by("a", x), self._seen_by("b", x))

    def _seen_by(self, name: str, x: Tensor) -> Tensor:
        return x * self.get_buffer(f"slope_{name}") + self.get_buffer(f"offset_{name}")


def evaluate_all(
    work: Work,
    parents: Parents,
    tasks: EvaluationSet,
    baselines: Mapping[str, pleas.MergeResult],
    merged: Sequence[Merged],
    refined: Sequence[Merged],
    oracles: Sequence[Merged],
    note: str,
) -> tuple[tuple[Row, ...], Curves]:
    """Every network on every task it can answer, and how refining got there.

    note: what the reader must know of the baselines
    """
    with work.progress.stage("evaluation"):
        judge, rows = Judge.with_parents(work, parents, tasks)
        rows += [judge.row(name, result, note=note) for name, result in baselines.items()]
        rows += [judge.row("merged", one.result, one.point) for one in merged]
        rows += [judge.row("refined", one.result, one.point, note=_verdict(one)) for one in refined]
        rows += [judge.row("oracle", one.result, one.point) for one in oracles]
        starts = {row.point: row.evaluation for row in rows if row.name == "merged"}
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
    parents: Parents
    tasks: EvaluationSet
    parent_scores: Mapping[str, Evaluation]

    @classmethod
    def with_parents(cls, work: Work, parents: Parents, tasks: EvaluationSet) -> tuple[Judge, list[Row]]:
        """A judge that knows what the parents answer, and the parents' own rows."""
        alone = cls(work, parents, tasks, {})
        labels = work.recipe.recipe.labels
        rows, scores = [], {}
        cost = pleas.flops(parents.a.module, parents.example)
        for parent in (parents.a, parents.b):
            columns = parent_columns(labels, parent.name, parent.outputs)
            scores[parent.name] = alone.score(parent.module, columns, parent.preprocess)
            rows.append(
                Row(f"parent {parent.name}", cost, 1.0, _parameters(parent.module), scores[parent.name])
            )
        judge = replace(alone, parent_scores=scores)
        both = BothParents(parents, labels)
        evaluation = judge.score(both, judge.columns, parents.input)
        rows.append(Row("ensemble", 2 * cost, 2.0, _parameters(both), evaluation))
        return judge, rows

    @property
    def columns(self) -> Columns:
        """Heads of a network that answers for both parents."""
        return merged_columns(self.work.recipe.recipe.labels, self.parents.a.outputs, self.parents.b.outputs)

    def row(self, name: str, result: pleas.MergeResult, point: Point | None = None, note: str = "") -> Row:
        evaluation = self.score(result.module, self.columns, self.parents.input)
        return Row(name, result.flops, result.ratio, result.parameters, evaluation, point, note)

    def curve(self, one: Merged, start: Evaluation) -> list[dict[str, float | None]]:
        """Accuracy of a network against seconds of refining, from what was kept of it on the way."""
        looks = [(0.0, start)]
        for taken in one.snapshots:
            looks.append((taken.seconds, self.score(taken.module, self.columns, self.parents.input)))
        return [{"seconds": at, "average": found.average, "joint": found.joint} for at, found in looks]

    def score(self, module: nn.Module, columns: Columns, preprocess: Preprocess) -> Evaluation:
        """As `evaluate`, from the store where this network met these images before."""
        meaning = {
            "state": content_hash(module.state_dict()),
            "network": pleas.program_config(module)
            or f"{type(module).__module__}.{type(module).__qualname__}",
            "parents": self.parents.fingerprint,
            "columns": {name: [head.start, head.stop] for name, head in columns.items()},
            "preprocess": preprocess.to_dict(),
            "tasks": self.tasks.fingerprint,
            "agreement": sorted(self.parent_scores),
            "device": self.work.device.type,
            "torch": torch.__version__,
        }

        def make() -> Stage:
            found = evaluate(
                module,
                self.tasks.tasks,
                preprocess,
                columns,
                parents=self.parent_scores,
                device=self.work.device,
                progress=self.work.progress,
            )
            predictions = {score.task: torch.from_numpy(score.predictions) for score in found.tasks}
            return Stage(predictions, found.to_dict())

        stage = self.work.finished("evaluation", meaning, make)
        return _evaluation(stage)


def _evaluation(stage: Stage) -> Evaluation:
    scores = tuple(
        TaskScore(
            task=task,
            expert=value["expert"],
            count=value["count"],
            accuracy=value["accuracy"],
            per_class=value["per_class"],
            worst_class=(value["worst_class"]["class"], value["worst_class"]["accuracy"]),
            agreement=value["agreement"],
            predictions=stage.tensors[task].numpy(),
        )
        for task, value in stage.value["tasks"].items()
    )
    return Evaluation(scores, stage.value["average"], stage.value["joint"])


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
