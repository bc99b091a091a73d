"""How high the loss rises on the straight line between two parents, as their units come and matched."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

import pleas
from datafree.evaluation.evaluate import Task, evaluate_outputs, predict
from datafree.evaluation.results import Line
from datafree.stages.inputs import EvaluationSet
from datafree.stages.parents import LoadedParents
from datafree.stages.work import Work
from pleas.network.build import build, draw

State = Mapping[str, Tensor]


def measure_barriers(
    work: Work, parents: LoadedParents, evidence: pleas.Evidence, tasks: EvaluationSet
) -> tuple[Line, ...]:
    """Every two parents, with and without matching; nothing where the recipe has no `barrier`.

    Batch norms keep the interpolated statistics: nothing is re-estimated.
    """
    points = work.recipe.recipe.barrier
    if points is None:
        return ()
    plan = pleas.make_plan(evidence, apart=0.0)
    drawing = draw(evidence.parents, plan)
    columns = parents.columns(work.recipe.recipe.labels)
    at = tuple(i / (points - 1) for i in range(points))

    def loss(state: State) -> float:
        module = build(evidence.parents, plan, drawing, dict(state))

        def outputs(task: Task) -> Tensor:
            return predict(module, task.images, parents.input, device=work.device)

        scores = evaluate_outputs(outputs, tasks.tasks, columns).tasks
        return sum(score.nll or 0.0 for score in scores) / len(scores)

    lines, done = [], 0
    pairs = list(itertools.combinations(range(len(parents.each)), 2))
    with work.progress.stage("barrier"):
        for (p, q), matched in itertools.product(pairs, (False, True)):
            states = evidence.states if matched else evidence.parents.states
            losses = _along(states[p], states[q], at, loss)
            lines.append(Line((parents.names[p], parents.names[q]), matched, at, losses))
            done += 1
            work.progress("barrier", done, 2 * len(pairs))
    return tuple(lines)


def _along(
    first: State, last: State, at: Sequence[float], loss: Callable[[State], float]
) -> tuple[float, ...]:
    return tuple(loss(between(first, last, t)) for t in at)


def between(first: State, last: State, t: float) -> dict[str, Tensor]:
    """The tensors at `t` on the way; whole numbers, such as counters, are the first one's."""
    return {
        name: torch.lerp(value, last[name], t) if value.is_floating_point() else value
        for name, value in first.items()
    }
