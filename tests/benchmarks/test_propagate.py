"""Measuring a group: what is measured, that nothing is measured twice, and how it is told."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import pleas
from benchmarks import common, propagate
from benchmarks.common import changed_settings
from benchmarks.pairs import Group, Task, accuracy
from benchmarks.propagate import Case, main, table
from datafree.errors import UsageError
from datafree.images.preprocess import Preprocess
from datafree.models.parent import Parent

PREPROCESS = Preprocess((6, 6), (0.5,), (0.25,))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(6, 3)).eval().requires_grad_(False)


def parent(seed: int, name: str) -> Parent:
    return Parent(name, network(seed), PREPROCESS, 3, None, "", {}, None, str(seed))


def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 1, 6, 6), np.uint8)


@pytest.fixture
def group() -> Group:
    """Two random networks of three classes, judged on 20 images each."""
    parents = {"a": lambda name: parent(1, name), "b": lambda name: parent(2, name)}
    labels = np.arange(20) % 3
    tasks = tuple(lambda name=name: Task(f"of {name}", images()[:20], labels, name) for name in parents)
    return Group("toy", "separate", parents, tasks, images, images)


@pytest.fixture
def place(group: Group, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setitem(propagate.PAIRS, "toy", group)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(common, "RUNS", tmp_path / "runs")
    return tmp_path


def start(*arguments: str, seeds: str = "0") -> str:
    line = ["--groups", "toy", "--images", "real", "--count", "32", "--budgets", "1.5", "--seeds", seeds]
    done = CliRunner().invoke(main, [*line, *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_rows_that_are_there_are_not_made_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start("--set", "propagate=0.7", "ridge=1e-2")
    rows = (place / "runs" / "propagate.rows.jsonl").read_text().splitlines()
    assert len(rows) == 1 + 2  # the references; permutation only and one budget
    assert [json.loads(row).get("propagate") for row in rows] == [None, None, 0.7]
    first = (place / "results" / "propagate.md").read_text()
    assert first.startswith("`python -m benchmarks.propagate")
    assert "| toy | 32 real | permutation only |  |  |" in first

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("this was measured before")

    with monkeypatch.context() as patch:
        patch.setattr(pleas, "assemble", forbidden)
        assert start("--set", "ridge=0.01", "--set", "propagate=0.7").count("\n| toy |") == 2
    assert (place / "runs" / "propagate.rows.jsonl").read_text().splitlines() == rows
    start("--set", "propagate=0.7", "ridge=1e-2", seeds="0,1")
    assert len((place / "runs" / "propagate.rows.jsonl").read_text().splitlines()) == len(rows) + 2


def test_a_merge_is_that_of_the_library(group: Group) -> None:
    settings = pleas.MergeSettings(heads="separate", seed=3)
    case = Case(group, "real", 40, settings, torch.device("cpu"))
    networks = pleas.Parents.of(group.modules, group.example(), settings)
    evidence = pleas.gather(networks, list(case.inputs))
    result = pleas.assemble(evidence, pleas.make_plan(evidence, budget=1.5))
    row = case.merged(1.5)
    assert row["held_out_error"] == result.held_out_error
    assert row["propagate"] == result.propagate
    assert row["accuracy"] == accuracy(result.module, group)
    assert sorted(case.inputs.pixels.sum((1, 2, 3))) == sorted(images().sum((1, 2, 3)))


def test_references_are_the_parents_on_their_own_tasks(group: Group) -> None:
    row = propagate.references(group)
    own = [accuracy(module, group)[f"of {name}"] for name, module in zip("ab", group.modules, strict=True)]
    assert row["parents"] == pytest.approx(sum(own) / 2)
    assert row["joint"] is not None


def test_too_few_images_are_refused(group: Group) -> None:
    case = Case(group, "public", 41, pleas.MergeSettings(), torch.device("cpu"))
    message = "group toy has 40 public images and 41 are asked for: lower --count"
    with pytest.raises(UsageError, match=re.escape(message)):
        _ = case.inputs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("ridg=1", "ridg=1: give KEY=VALUE, with one of the keys allocation, head_ridge, holdout, matching"),
        ("ridge", "ridge: give KEY=VALUE, with one of the keys"),
        ("seed=1", "seed=1: give KEY=VALUE, with one of the keys"),
        ("rows=many", "rows = many: Input should be a valid integer"),
        ("ridge=-1", "ridge = -1.0: must be > 0, for example 1e-2 (relative to the mean diagonal)"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: str, message: str) -> None:
    with pytest.raises(click.UsageError, match=re.escape(message)):
        changed_settings([change], "shared", 0)


def test_settings_are_read_as_what_they_are() -> None:
    found = changed_settings(["propagate=auto", "rows=4", "ridge=1e-2"], "separate", 7)
    assert found == pleas.MergeSettings(heads="separate", seed=7, rows=4, ridge=0.01)
    assert changed_settings(["propagate=0.7"], "shared", 0).propagate == 0.7


def test_mistakes_are_found_before_any_work(place: Path) -> None:
    assert "ridge = 0.0: must be > 0" in start("--set", "ridge=0")
    assert "nobody: known are resnet20, " in start("--groups", "nobody")
    assert not (place / "runs").exists()


def test_a_table_is_of_means_over_seeds() -> None:
    top = {"run": {"group": "g", "method": "references"}, "parents": 0.9, "average": 0.95, "joint": None}

    def row(seed: int, average: float, propagate: float, error: float) -> common.Row:
        run = {"group": "g", "images": "real", "count": 8, "method": "merged", "budget": 1.25}
        told = {"propagate": propagate, "held_out_error": error, "average": average, "joint": None}
        return {"run": run | {"seed": seed}, **told, "seconds": {"gather": 1.0, "solve": 2.0 + seed}}

    assert table([top, row(0, 0.8, 0.7, 0.1), row(1, 0.82, 1.0, 0.3)]).splitlines()[-1] == (
        "| g | 8 real | 1.25x | 0.7 / 1 | 0.200 ± 0.141 | 81.0 ± 1.4 |  | 90.0 | 95.0 | 1.0 ± 0.0 | 2.5 ± 0.7 |"
    )
