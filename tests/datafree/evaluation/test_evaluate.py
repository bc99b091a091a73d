"""Evaluation against sums done by hand, with networks whose answers are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datafree.errors import RunError, UsageError
from datafree.evaluation.evaluate import (
    Evaluation,
    Task,
    TaskScore,
    TaskSpec,
    check_tasks,
    evaluate,
    evaluate_outputs,
    head_of,
    load_task,
    merged_columns,
    parent_columns,
    predict,
    relative_to,
)
from datafree.images.image_set import ImageSet
from datafree.images.preprocess import Preprocess

PLAIN = Preprocess((2, 2), (0.0,), (1.0,))


class FirstPixel(nn.Module):
    """Chooses the class written in the first pixel, plus `offset`, among `outputs`."""

    def __init__(self, outputs: int, offset: int = 0) -> None:
        super().__init__()
        self.outputs, self.offset = outputs, offset
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0, 0, 0] * 255).round().long() + self.offset
        return nn.functional.one_hot(chosen % self.outputs, self.outputs) * self.scale


def task(
    answers: list[int], targets: list[int], *, expert: str | None = None, name: str = "t", first: int = 0
) -> Task:
    """Images on which FirstPixel answers `answers`; `first` is the label of target 0."""
    images = np.zeros((len(answers), 1, 2, 2), np.uint8)
    images[:, 0, 0, 0] = answers
    labels = np.array(targets) + first
    return Task(name, expert, ImageSet(name, images, labels, tuple("klmnopqrst")), np.array(targets))


def run(module: nn.Module, tasks: list[Task], columns: Any, **keys: Any) -> Evaluation:
    return evaluate(module, tasks, PLAIN, columns, **keys)


def test_accuracy_and_worst_class_are_counted() -> None:
    given = task([0, 0, 1, 1, 1, 2], [0, 0, 1, 2, 2, 2], first=3)
    score = run(FirstPixel(3), [given], parent_columns("shared", "a", {"a": 3, "b": 3}), batch_size=4).tasks[
        0
    ]
    assert score.count == 6
    assert score.accuracy == pytest.approx(4 / 6)
    assert score.per_class == pytest.approx({"n": 1.0, "o": 1.0, "p": 1 / 3})
    assert score.worst_class == pytest.approx(("p", 1 / 3))
    assert score.predictions.tolist() == [0, 0, 1, 1, 1, 2]


def test_agreement_is_with_each_parents_choice() -> None:
    tasks = [task([0, 1, 2, 0], [0, 1, 2, 2])]
    columns = parent_columns("shared", "a", {"a": 3, "b": 3})
    same, shifted = (run(FirstPixel(3, offset), tasks, columns) for offset in (0, 1))
    score = run(FirstPixel(3), tasks, columns, parents={"a": same, "b": shifted}).tasks[0]
    assert score.agreement == {"a": 1.0, "b": 0.0}


def test_separate_heads_answer_their_own_tasks_and_jointly() -> None:
    tasks = [
        task([0, 1, 2], [0, 1, 1], expert="a", name="low"),
        task([3, 4, 1], [1, 2, 2], expert="b", name="high"),
    ]
    result = run(FirstPixel(5), tasks, merged_columns("separate", {"a": 2, "b": 3}))
    low, high = result.tasks
    assert low.predictions.tolist() == [0, 1, 0]  # the third image's answer lies in the other head
    assert low.accuracy == pytest.approx(2 / 3)
    assert high.predictions.tolist() == [1, 2, 0]
    assert result.average == pytest.approx(2 / 3)
    assert result.joint == pytest.approx((2 + 2) / 6)


def test_a_parent_answers_only_its_own_tasks_when_labels_are_separate() -> None:
    tasks = [task([0, 1], [0, 1], expert="a", name="low"), task([0, 1], [0, 1], expert="b", name="high")]
    result = run(FirstPixel(2), tasks, parent_columns("separate", "b", {"a": 2, "b": 2}))
    assert [score.task for score in result.tasks] == ["high"]
    assert result.score("low") is None
    assert result.joint is None


def test_shared_labels_have_no_joint_accuracy() -> None:
    tasks = [task([0, 1], [0, 0], name="p"), task([1, 1], [1, 1], name="q")]
    result = run(FirstPixel(2), tasks, merged_columns("shared", {"a": 2, "b": 2}))
    assert result.average == 0.75
    assert result.joint is None


def test_results_are_plain_values() -> None:
    result = run(FirstPixel(2), [task([0, 1], [0, 0])], merged_columns("shared", {"a": 2, "b": 2}))
    wrong = math.log(1 + math.e)
    assert json.loads(json.dumps(result.to_dict())) == {
        "tasks": {
            "t": {
                "expert": None,
                "count": 2,
                "accuracy": 0.5,
                "interval": [0.0, 1.0],
                "normalised": None,
                "top5": None,
                "nll": pytest.approx((wrong - 1 + wrong) / 2),
                "calibration": pytest.approx(abs(0.5 - math.e / (1 + math.e))),
                "error": None,
                "per_class": {"k": 0.5},
                "worst_class": {"class": "k", "accuracy": 0.5},
                "agreement": {},
            }
        },
        "average": 0.5,
        "interval": [0.0, 1.0],
        "normalised": None,
        "joint": None,
        "joint_interval": None,
    }


def test_accuracy_is_also_told_as_a_share_of_the_experts() -> None:
    tasks = [task([0, 1, 2, 0], [0, 1, 2, 2], expert="a"), task([0, 1, 2, 0], [1, 2, 0, 1], name="u")]
    columns = parent_columns("shared", "a", {"a": 3, "b": 3})
    a, b = (run(FirstPixel(3, offset), tasks, columns) for offset in (0, 1))
    half = run(FirstPixel(3), [task([0, 1, 2, 0], [0, 1, 0, 0], expert="a")], columns)
    assert [score.accuracy for score in a.tasks] == [0.75, 0.0]
    assert [score.accuracy for score in b.tasks] == [0.0, 1.0]
    found = relative_to({"a": a, "b": b}, a)
    assert [score.normalised for score in found.tasks] == [1.0, 0.0], (
        "the best parent stands for a missing expert"
    )
    assert relative_to({"a": a}, half).tasks[0].normalised == pytest.approx(1.0)
    assert relative_to({"b": b}, half).normalised is None, "an expert that gets nothing right is no measure"


def test_outputs_are_compared_with_the_ensembles() -> None:
    given, logits = task([0, 1], [0, 1]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    columns = merged_columns("shared", {"a": 2, "b": 2})
    (score,) = evaluate_outputs(lambda _: logits + 0.1, [given], columns, lambda _: logits).tasks
    assert score.error == pytest.approx(4 * 0.1**2 / 1.0)
    (score,) = evaluate_outputs(lambda _: logits, [given], columns, lambda _: logits[:, :1]).tasks
    assert score.error is None, "a parent's own head is not the ensemble's heads"


def test_a_score_comes_back_from_its_plain_values() -> None:
    (score,) = run(FirstPixel(2), [task([0, 1], [0, 0])], merged_columns("shared", {"a": 2})).tasks
    plain = json.loads(json.dumps(score.to_dict()))
    assert TaskScore.from_dict("t", plain, score.predictions, score.targets) == score


def test_batch_size_changes_nothing_and_progress_is_told() -> None:
    images = task([0, 1, 2, 1, 0], [0] * 5).images
    told: list[tuple[int, int]] = []
    small = predict(
        FirstPixel(3), images, PLAIN, batch_size=2, progress=lambda _, done, total: told.append((done, total))
    )
    assert torch.equal(small, predict(FirstPixel(3), images, PLAIN, batch_size=100))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_the_module_is_left_as_it_was() -> None:
    module = nn.Sequential(FirstPixel(3), nn.Dropout()).train()
    module[1].eval()
    predict(module, task([0], [0]).images, PLAIN)
    assert (module.training, module[0].training, module[1].training) == (True, True, False)


def test_non_finite_outputs_are_an_error() -> None:
    module = FirstPixel(2)
    nn.init.constant_(module.scale, float("nan"))
    with pytest.raises(RunError, match="task t: the network returned NaN or infinity"):
        run(module, [task([0], [0])], merged_columns("shared", {"a": 2, "b": 2}))


def test_tasks_that_do_not_fit_the_heads_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"task t: label 4 \(after label_offset\) is beyond the head's 3 outputs"
    ):
        check_tasks([task([0], [4])], merged_columns("shared", {"a": 3, "b": 3}))
    three = merged_columns("separate", {"day": 1, "night": 3, "dusk": 2})
    with pytest.raises(UsageError) as caught:
        check_tasks([task([0], [0])], three)
    assert str(caught.value) == (
        "task t: where parents have labels of their own each task needs one parent's: say `expert: day` or another of "
        "day, night, dusk"
    )
    check_tasks([task([0], [2], expert="night")], three)
    with pytest.raises(UsageError, match="task t: expert 'nigth' is no parent; did you mean 'night'"):
        check_tasks([task([0], [0], expert="nigth")], three)
    with pytest.raises(UsageError, match="expert 'x' is no parent; the parents are day, night, dusk"):
        check_tasks([task([0], [0], expert="x")], three)
    with pytest.raises(UsageError, match=r"label 2 \(after label_offset\) is beyond the head's 2 outputs"):
        check_tasks([task([0], [2], expert="dusk")], three)


@pytest.mark.parametrize("expert", [None, "a", "c"])
def test_shared_labels_have_one_head_whoever_the_expert_is(expert: str | None) -> None:
    columns = merged_columns("shared", {"a": 4, "b": 4, "c": 4})
    assert head_of(task([0], [0], expert=expert), columns) == slice(0, 4)


def test_three_heads_stand_in_the_order_of_the_parents() -> None:
    outputs = {"a": 2, "b": 3, "c": 4}
    columns = merged_columns("separate", outputs)
    assert columns == {"a": slice(0, 2), "b": slice(2, 5), "c": slice(5, 9)}
    assert parent_columns("separate", "c", outputs) == {"c": slice(0, 4)}
    tasks = [
        task([0, 1], [0, 1], expert="a", name="p"),
        task([2, 4], [0, 1], expert="b", name="q"),
        task([8, 0], [3, 0], expert="c", name="r"),
    ]
    result = run(FirstPixel(9), tasks, columns)
    assert [score.accuracy for score in result.tasks] == [1.0, 0.5, 1.0]
    assert result.joint == pytest.approx((2 + 1 + 1) / 6)


def test_both_means_all_parents_as_in_older_recipes(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", x_test=np.zeros((1, 2, 2), np.uint8), y_test=[0])
    for expert in ("both", None):
        spec = TaskSpec.model_validate({"name": "t", "expert": expert, "images": {"npz": "set.npz"}})
        assert load_task(spec, tmp_path).expert is None


def test_a_task_is_loaded_with_its_offset(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "set.npz",
        x_test=np.zeros((4, 2, 2), np.uint8),
        y_test=[0, 5, 6, 7],
        bare=np.zeros((1, 2, 2), np.uint8),
    )
    images = {"npz": "set.npz", "keep_labels": (5, 7)}
    spec = TaskSpec.model_validate({"name": "high", "expert": "b", "images": images, "label_offset": 5})
    loaded = load_task(spec, tmp_path)
    assert loaded.targets.tolist() == [0, 2]
    assert loaded.class_names() == {0: "5", 2: "7"}
    with pytest.raises(
        UsageError, match="task high: label_offset is 5 and the smallest label is 0: lower the offset"
    ):
        load_task(
            spec.model_copy(update={"images": spec.images.model_copy(update={"keep_labels": None})}), tmp_path
        )
    with pytest.raises(
        UsageError, match=r"task t: set.npz \(bare\) has no labels, so accuracy cannot be measured"
    ):
        load_task(TaskSpec.model_validate({"name": "t", "images": {"npz": "set.npz", "x": "bare"}}), tmp_path)
