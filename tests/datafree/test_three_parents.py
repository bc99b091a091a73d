"""A recipe with three parents from front to back: merged, saved, loaded, evaluated, and found again in the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import datafree
import pleas
from datafree.cache.store import CACHE_VARIABLE
from datafree.cli import main
from datafree.errors import UsageError
from datafree.evaluation.evaluate import Labels
from datafree.pipeline import Outcome, run
from datafree.recipe.file import RecipeFile
from datafree.stages import AllParents, begin, load_parents
from tests.datafree.tiny import Tiny, make_tiny

PREPROCESS = "preprocess: {size: 8, mean: [0.3], std: [0.4]}"
OUTPUTS = {"a": 10, "b": 4, "late": 3}  # of heads of their own
CLASSES = {"a": range(10), "b": range(4), "late": range(7, 10)}  # that a union joins by name
TASKS = (
    "evaluate=[{name: upright, expert: a, images: {digits: {domain: upright}, limit: 40}}, "
    "{name: low, expert: b, images: {digits: {domain: rotated}, keep_labels: [0, 1, 2, 3], limit: 40}}, "
    "{name: high, expert: late, label_offset: 7, images: {digits: {domain: rotated}, keep_labels: [7, 8, 9], "
    "limit: 40}}]"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Three parents of one head, and two more whose heads are smaller."""
    made = make_tiny(tmp_path_factory.mktemp("three"))
    made.write_parent("late", 3)
    made.write_parent("b4", 4, num_classes=OUTPUTS["b"])
    made.write_parent("late3", 5, num_classes=OUTPUTS["late"])
    return made


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    patch = pytest.MonkeyPatch()
    patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


def recipe(tiny: Tiny, labels: str, *changes: str) -> RecipeFile:
    late = f'{{model: "python:net.py:net", weights: late.safetensors, {PREPROCESS}}}'
    made: tuple[str, ...] = (f"parents.late={late}", "merge.budgets=[1.0, 1.5]", "oracle=null")
    if labels != "shared":
        made += (f"labels={labels}", TASKS)
        for name, weights in (("b", "b4"), ("late", "late3")):
            made += (
                f"parents.{name}.weights={weights}.safetensors",
                f"parents.{name}.arguments.num_classes={OUTPUTS[name]}",
            )
    if labels == "union":
        made += tuple(
            f"parents.{name}.classes=[{','.join(f'digit{i}' for i in known)}]"
            for name, known in CLASSES.items()
        )
    return tiny.load(*made, *changes)


@pytest.fixture(scope="module", params=["shared", "separate", "union"])
def merged(request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(recipe(tiny, request.param), tmp_path_factory.mktemp("out") / "three")


def test_every_parent_has_its_row_and_the_ensemble_costs_three(merged: Outcome) -> None:
    assert [row.label for row in merged.results.rows] == [
        *("parent a", "parent b", "parent late", "ensemble", "plain average", "permutation only"),
        *("merged, budget 1", "merged, budget 1.5"),
    ]
    (ensemble,) = merged.results.of_kind("ensemble")
    assert ensemble.ratio == 3
    assert list(merged.record["parents"]) == ["a", "b", "late"]
    for row in merged.results.of_kind("merged"):
        assert row.predicted is not None
        assert row.ratio <= (row.point.value if row.point else 0) + 0.1  # heads of their own cost a little
        for score in row.evaluation.tasks:
            known = {"a", "b", "late"} if merged.results.labels == "shared" else {score.expert}
            assert set(score.agreement) == known


def test_the_plan_says_whose_the_units_are(merged: Outcome) -> None:
    plans = [json.loads((folder / "config.json").read_text())["plan"] for folder in merged.artefacts]
    assert all(row["width"] == sum(row["owners"].values()) for plan in plans for row in plan)
    owners = {name for row in plans[1] for name in row["owners"]}
    assert "a + b + late" in owners
    assert owners & {"a", "b", "late"}, "half as much again keeps something apart"


def test_the_artefact_alone_gives_the_merged_network_and_its_numbers(merged: Outcome, tiny: Tiny) -> None:
    labels, rows = merged.results.labels, merged.results.of_kind("merged")
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for one, folder, row in zip(merged.merged, merged.artefacts, rows, strict=True):
        artefact = datafree.load(folder)
        with torch.no_grad():
            assert torch.equal(artefact.module(x), one.result.module(x))
        heads = {head.parents: head.outputs for head in artefact.heads}
        assert heads == (OUTPUTS if labels == "separate" else {"a, b and late": 10})
        again = CliRunner().invoke(
            main, ["eval", str(folder), str(folder / "recipe.resolved.yaml"), "--json"]
        )
        assert again.exit_code == 0, again.output
        found = json.loads(again.stdout)
        assert (found["average"], found["joint"]) == (row.evaluation.average, row.evaluation.joint)
        accuracies = {name: task["accuracy"] for name, task in found["tasks"].items()}
        assert accuracies == {score.task: score.accuracy for score in row.evaluation.tasks}


def test_card_and_report_name_all_three(merged: Outcome) -> None:
    card = (merged.artefacts[1] / "README.md").read_text()
    page = (merged.folder / "report.html").read_text()
    assert "merged from 3 parents of one architecture" in card
    for name in ("a", "b", "late"):
        assert f"- parent {name}: `python:net.py:net`" in card
        assert f"<td>parent {name}</td>" in page
    assert "3 networks merged into one" in page


def content(folder: Path) -> dict[str, bytes]:
    files = [*folder.rglob("*.safetensors"), *folder.rglob("config.json"), folder / "metrics.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_second_run_finds_the_merged_networks_in_the_store(
    merged: Outcome, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved: list[bool] = []
    assemble = pleas.assemble

    def watched(*arguments: Any, least_squares: bool = True, **options: Any) -> Any:
        solved.append(least_squares)
        return assemble(*arguments, least_squares=least_squares, **options)

    monkeypatch.setattr(pleas, "assemble", watched)
    monkeypatch.setattr(pleas, "collect", None)
    again = run(recipe(tiny, merged.results.labels), tmp_path / "again")
    assert solved
    assert not any(solved), "only averages are made again"
    assert content(again.folder) == content(merged.folder)


@pytest.mark.parametrize("merged", ["shared"], indirect=True)
def test_parents_in_another_order_are_another_merge(
    merged: Outcome, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics hold the units of all parents side by side: those of another order are not taken from the store."""
    text = tiny.recipe.read_text().splitlines()
    first = next(number for number, line in enumerate(text) if line.startswith("  a: "))
    text[first], text[first + 1] = text[first + 1], text[first]
    turned = Tiny(tmp_path / "turned")
    turned.folder.mkdir()
    for path in tiny.folder.iterdir():
        if path.is_file():
            (turned.folder / path.name).write_bytes(path.read_bytes())
    turned.recipe.write_text("\n".join(text))
    collected: list[int] = []
    collect = pleas.collect
    monkeypatch.setattr(pleas, "collect", lambda *a, **k: collected.append(1) or collect(*a, **k))
    other = run(recipe(turned, "shared", "merge.budgets=[1.0]"), tmp_path / "out")
    assert collected == [1]
    assert [row.name for row in other.results.of_kind("parent")] == ["b", "a", "late"]
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two = (found.merged[0].result.module(x) for found in (merged, other))
    torch.testing.assert_close(one, two, rtol=0.05, atol=0.05)


def test_a_union_needs_the_classes_of_every_parent(tiny: Tiny) -> None:
    with pytest.raises(UsageError, match=r"late has none: give `parents\.late\.classes`"):
        load_parents(begin(recipe(tiny, "union", "parents.late.classes=null")))


@pytest.mark.parametrize("labels", ["shared", "separate"])
def test_the_ensemble_takes_the_pixels_as_every_parent_does(tiny: Tiny, labels: Labels) -> None:
    parents = load_parents(begin(recipe(tiny, labels, "parents.late.preprocess.mean=[0.6]")))
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        own = [parent.module(parent.preprocess(images)) for parent in parents.each]
        found = AllParents(parents, labels).eval()(parents.input(images))
    expected = sum(own) / 3 if labels == "shared" else torch.cat(own, 1)
    torch.testing.assert_close(found, expected)


def test_the_faults_of_all_parents_are_said_at_once(tiny: Tiny) -> None:
    wrong = recipe(
        tiny,
        "shared",
        "parents.a.weights=absent.safetensors",
        "parents.late.arguments.width=7",
        "parents.b.weights_key=ema",
    )
    with pytest.raises(UsageError) as caught:
        load_parents(begin(wrong))
    lines = str(caught.value).splitlines()
    assert [line.partition(": parent ")[0].rpartition(" ")[2] for line in lines] == [
        *("parents.a", "parents.b.weights_key", "parents.late"),
    ]
    assert lines[1].startswith("--set parents.b.weights_key=ema: ")


def test_a_third_parent_that_does_not_fit_is_named(tiny: Tiny) -> None:
    with pytest.raises(UsageError) as caught:
        load_parents(begin(recipe(tiny, "shared", "parents.late.classes=[k,l,m,n,o,p,q,r,s,t]",
                                  "parents.a.classes=[k,l,m,n,o,p,q,r,t,s]")))  # fmt: skip
    assert "output 8 is 't' in a and 's' in late: say `labels: separate`" in str(caught.value)
    with pytest.raises(UsageError, match="parents a and late are not one architecture"):
        load_parents(
            begin(recipe(tiny, "shared", "parents.late.arguments.width=8", "parents.late.weights=null",
                         "parents.late.random_weights=true"))
        )  # fmt: skip
