"""Every network on every task: the parents, the ensemble, the other methods, the merged networks, the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import pleas
from datafree.cache.store import Stage, content_hash
from datafree.evaluation.evaluate import Columns, Evaluation, TaskScore, evaluate, parent_columns
from datafree.evaluation.results import Kind, Point, Row
from datafree.images.preprocess import Preprocess
from datafree.stages.comparing import Compared
from datafree.stages.inputs import EvaluationSet
from datafree.stages.merging import Merged
from datafree.stages.parents import LoadedParents
from datafree.stages.work import Work

Curves = Mapping[Point, list[dict[str, float | None]]]  # seconds of refining, task average, joint accuracy


class AllParents(nn.Module):
    """The ensemble as a network of the merged network's input, whatever the parents' own normalisation."""

    def __init__(self, parents: LoadedParents, labels: str) -> None:
        super().__init__()
        self.ensemble = pleas.Ensemble(*(parent.module for parent in parents.each), heads=labels)
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
) -> tuple[tuple[Row, ...], Curves]:
    """Every network on every task it can answer, and how refining got there.

    notes: what the reader must know of other methods, by name
    """
    with work.progress.stage("evaluation"):
        said = dict.fromkeys(text for one in merged for text in one.result.contradictions)
        judge, rows = Judge.with_parents(work, parents, tasks, ". ".join(said))
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

    @classmethod
    def with_parents(
        cls, work: Work, parents: LoadedParents, tasks: EvaluationSet, note: str = ""
    ) -> tuple[Judge, list[Row]]:
        """A judge that knows what the parents answer, and the parents' own rows.

        note: what the reader must know of the ensemble
        """
        alone = cls(work, parents, tasks, {})
        labels = work.recipe.recipe.labels
        rows, scores = [], {}
        cost = pleas.flops(parents.first.module, parents.example)
        outputs = {parent.name: parent.outputs for parent in parents.each}
        for parent in parents.each:
            columns = parent_columns(labels, parent.name, outputs)
            scores[parent.name] = alone.score(parent.module, columns, parent.preprocess)
            rows.append(
                Row("parent", parent.name, cost, 1.0, _parameters(parent.module), scores[parent.name])
            )
        judge = replace(alone, parent_scores=scores)
        together, count = AllParents(parents, labels), len(parents.each)
        evaluation = judge.score(together, judge.columns, parents.input)
        size = _parameters(together)
        rows.append(Row("ensemble", "", count * cost, float(count), size, evaluation, note=note))
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
        return Row(
            kind, name, result.flops, result.ratio, result.parameters, evaluation, point, note, predicted
        )

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
