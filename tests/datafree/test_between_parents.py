"""The loss on the line between two parents, how alike their units are, and how long networks take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pleas
from datafree.cache.store import CACHE_VARIABLE
from datafree.evaluation.evaluate import evaluate_outputs, predict
from datafree.evaluation.latency import LEAST, measure_latency
from datafree.evaluation.results import Line
from datafree.recipe.file import load_recipe
from datafree.stages import (
    EvaluationSet,
    LoadedParents,
    Work,
    begin,
    gather_evidence,
    layer_similarity,
    load_parents,
    load_tasks,
    make_proxies,
    measure_barriers,
    proxy_inputs,
    trace_parents,
)
from datafree.stages.barrier import between
from tests.datafree.tiny import Tiny, make_tiny

Stages = tuple[Work, LoadedParents, pleas.Evidence, EvaluationSet]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def stages(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        work = begin(tiny.load("barrier=3"))
        parents = load_parents(work)
        tasks = load_tasks(work, parents)
        networks = trace_parents(work, parents)
        inputs = proxy_inputs(work, parents, make_proxies(work, parents, tasks))
        return work, parents, gather_evidence(work, parents, networks, inputs), tasks


def test_the_line_starts_and_ends_with_the_parents(stages: Stages) -> None:
    work, parents, evidence, tasks = stages
    plain, matched = measure_barriers(work, parents, evidence, tasks)
    assert (plain.matched, matched.matched) == (False, True)
    assert plain.at == (0.0, 0.5, 1.0)
    columns = parents.columns("shared")
    for end, parent in ((0, parents.each[0]), (-1, parents.each[1])):
        found = evaluate_outputs(
            lambda task, parent=parent: predict(parent.module, task.images, parent.preprocess),
            tasks.tasks,
            columns,
        )
        expected = sum(score.nll or 0.0 for score in found.tasks) / 2
        for line in (plain, matched):
            assert line.losses[end] == pytest.approx(expected, rel=1e-4), "matching does not change a network"
    assert plain.losses[1] != matched.losses[1]
    assert measure_barriers(begin(load_recipe(work.recipe.path)), parents, evidence, tasks) == ()


def test_a_barrier_is_measured_from_the_straight_line() -> None:
    assert Line(("a", "b"), True, (0.0, 0.5, 1.0), (1.0, 3.0, 2.0)).barrier == pytest.approx(1.5)
    assert Line(("a", "b"), True, (0.0, 0.5, 1.0), (1.0, 1.2, 2.0)).barrier == 0
    half = between(
        {"w": torch.zeros(2), "n": torch.tensor(3)}, {"w": torch.ones(2), "n": torch.tensor(5)}, 0.5
    )
    assert half["w"].tolist() == [0.5, 0.5]
    assert half["n"] == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [("evaluate=[]", "barrier is a loss on labelled images: add tasks under `evaluate`, or remove it"),
     ("labels=separate", "barrier is measured between parents that predict the same classes"),
     ("barrier=2", "barrier")],
)  # fmt: skip
def test_a_barrier_needs_labels_and_one_head(tiny: Tiny, change: str, said: str) -> None:
    with pytest.raises(Exception, match=said):
        tiny.load("barrier=5", change)


def test_matching_makes_units_more_alike(stages: Stages) -> None:
    found = layer_similarity(stages[2])
    assert [one["layer"] for one in found] == ["stem", "block.conv1", "block.conv2", "head"]
    inner = [one for one in found if one["layer"] != "head"]
    assert sum(one["matched"] for one in inner) > sum(one["unmatched"] for one in inner)
    assert found[-1]["matched"] == found[-1]["unmatched"], "outputs stay in the order of the labels"


class Sleeper(nn.Module):
    def __init__(self, name: str, heard: list[str]) -> None:
        super().__init__()
        self.name, self.heard = name, heard

    def forward(self, x: Tensor) -> Tensor:
        self.heard.append(self.name)
        return x


def test_networks_are_timed_in_turns() -> None:
    heard: list[str] = []
    networks = {name: Sleeper(name, heard).train() for name in "abc"}
    found = measure_latency(networks, torch.zeros(2, 1, 4, 4), device=torch.device("cpu"), limit=0.0)
    assert found.rounds == LEAST
    assert "".join(heard) == "abc" + "abc" + "bca" + "cab"
    told = found.to_dict()
    assert told["networks"]["a"]["ratio"] == 1.0
    assert set(told["networks"]) == {"a", "b", "c"}
    assert all(module.training for module in networks.values()), "they are left as they were"


def test_the_recipe_of_a_run_keeps_its_barrier(tiny: Tiny, tmp_path: Path) -> None:
    assert "barrier: 5" in tiny.load("barrier=5").resolved(tmp_path)
    assert "barrier" not in tiny.load().resolved(tmp_path)
