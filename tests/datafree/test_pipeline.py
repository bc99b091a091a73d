"""The whole run on a tiny recipe: what is written, what is compared, what stops it, and that it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import datafree
import pleas
from datafree.cache.store import CACHE_VARIABLE, Stage
from datafree.cli import main
from datafree.commands.plan import plan_text
from datafree.errors import UsageError
from datafree.pipeline import Outcome, run
from datafree.recipe.file import load_recipe
from datafree.stages import AllParents, begin, load_parents, load_tasks, make_proxies
from tests.datafree.tiny import Tiny, make_tiny

ORACLE = ("oracle.count=64", "oracle.images.digits={split: train}")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def outcome(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(tiny.load(*ORACLE), tmp_path_factory.mktemp("merged") / "out")


@pytest.fixture
def own_tiny(tmp_path: Path) -> Tiny:
    """A copy that a test may damage."""
    return make_tiny(tmp_path / "tiny")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def _invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# what is left -------------------------------------------------------------------------------------


def test_the_folder_holds_an_artefact_per_budget_and_the_report_over_all(outcome: Outcome) -> None:
    assert sorted(path.name for path in outcome.folder.iterdir()) == [
        "budget-1", "budget-1.4", "metrics.json", "recipe.resolved.yaml", "recipe.yaml", "report.html",
        "run.json",
    ]  # fmt: skip
    for folder in outcome.artefacts:
        assert sorted(path.name for path in folder.iterdir()) == [
            "README.md", "config.json", "model.safetensors", "recipe.resolved.yaml", "recipe.yaml",
        ]  # fmt: skip


def test_every_network_is_compared(outcome: Outcome) -> None:
    assert [row.label for row in outcome.results.rows] == [
        "parent a", "parent b", "ensemble", "plain average", "permutation only",
        "merged, budget 1", "merged, budget 1.4", "oracle, budget 1", "oracle, budget 1.4",
    ]  # fmt: skip
    metrics = json.loads((outcome.folder / "metrics.json").read_text())
    assert [row["name"] for row in metrics["rows"]] == [row.title for row in outcome.results.rows]
    assert set(metrics["rows"][0]["tasks"]) == {"upright", "rotated"}
    assert all(0 <= row["average"] <= 1 for row in metrics["rows"])
    by_label = {row.label: row for row in outcome.results.rows}
    assert by_label["ensemble"].ratio == 2
    assert by_label["merged, budget 1"].ratio == pytest.approx(1)
    assert 1 < by_label["merged, budget 1.4"].ratio <= 1.4
    assert "re-estimated on the proxies" in by_label["permutation only"].note


def test_loaded_artefacts_are_the_merged_networks(outcome: Outcome, tiny: Tiny) -> None:
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    for one, folder in zip(outcome.merged, outcome.artefacts, strict=True):
        artefact = datafree.load(folder)
        x = artefact.preprocess(images)
        with torch.no_grad():
            assert torch.equal(artefact.module(x), one.result.module(x))


def test_artefacts_need_no_python_file_of_the_parents(outcome: Outcome, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(outcome.artefacts[0], moved)
    assert datafree.load(moved).module(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_run_json_says_how_it_was_made(outcome: Outcome) -> None:
    record = json.loads((outcome.folder / "run.json").read_text())
    stages = ["parents", "images", "symmetry", "proxies", "statistics", "matching", "plan", "least squares"]
    assert [stage for stage in record["timings"] if stage in stages] == stages
    assert record["versions"]["datafree"] == datafree.__version__
    assert record["proxies"]["sources"][0]["kind"] == "noise"
    assert [one["source"] for one in record["proxies"]["diagnosis"]["sources"]] == ["1 noise"]
    assert record["oracle"] == 64
    assert record["parents"]["a"]["weights"] == "a.safetensors"


def test_the_report_and_the_cards_are_readable(outcome: Outcome) -> None:
    page = (outcome.folder / "report.html").read_text()
    assert page.count('role="img"') == 6, "accuracy: mean and two tasks; error, similarity and residual"
    assert page.count("data:image/") == 1, "the proxies' contact sheet"
    assert "merged, budget 1.4" in page
    assert "looks to the parents" in page
    card = (outcome.artefacts[1] / "README.md").read_text()
    assert "# tiny, budget 1.4" in card
    assert "| **merged, budget 1.4** |" in card, "the row of this folder is bold"


# the same again -----------------------------------------------------------------------------------


def _bytes(folder: Path) -> dict[str, bytes]:
    files = [*folder.rglob("*.safetensors"), *folder.rglob("config.json"), folder / "metrics.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_resolved_recipe_gives_the_same_merge(outcome: Outcome, tmp_path: Path) -> None:
    again = run(load_recipe(outcome.folder / "recipe.resolved.yaml"), tmp_path / "out")
    assert _bytes(again.folder) == _bytes(outcome.folder)


def test_an_interrupted_run_goes_on_to_the_same_result(
    outcome: Outcome, tiny: Tiny, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected: list[int] = []
    collect, assemble = pleas.collect, pleas.assemble

    def counting(*arguments: Any, **options: Any) -> Any:
        collected.append(1)
        return collect(*arguments, **options)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(pleas, "collect", counting)
    monkeypatch.setattr(pleas, "assemble", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny.load(*ORACLE), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(collected) == 1
    monkeypatch.setattr(pleas, "assemble", assemble)
    again = run(tiny.load(*ORACLE), tmp_path / "out")
    assert len(collected) == 2, "the proxies' statistics were there already, the oracle's were not"
    assert _bytes(again.folder) == _bytes(outcome.folder)


def test_a_damaged_stage_is_said_and_made_again(tiny: Tiny, own_cache: Path) -> None:
    work = begin(tiny.load())
    stage = Stage({"x": torch.arange(3)}, {"b": 1, "a": 2})
    assert work.finished("some", {"k": 1}, lambda: stage) is stage
    found = work.finished("some", {"k": 1}, lambda: pytest.fail("it was there"))
    assert list(found.value.items()) == [("b", 1), ("a", 2)]
    (path,) = (own_cache / "some").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert work.finished("some", {"k": 1}, lambda: stage) is stage
    (note,) = work.progress.notes
    assert note == f"{path} does not have the content it was written with; it is computed again"
    assert work.finished("some", {"k": 1}, lambda: pytest.fail("mended")).tensors["x"].tolist() == [0, 1, 2]


# two heads, two normalisations --------------------------------------------------------------------


def test_separate_labels_give_one_head_per_parent(own_tiny: Tiny, tmp_path: Path) -> None:
    own_tiny.write_parent("b", 3, num_classes=5)
    out = run(
        own_tiny.load(
            "labels=separate",
            "parents.b.arguments.num_classes=5",
            "evaluate.0.expert=a",
            "evaluate.1.expert=b",
            "evaluate.1.images.keep_labels=[0, 1, 2, 3, 4]",
        ),
        tmp_path / "out",
    )
    artefact = datafree.load(out.artefacts[0])
    assert [head.outputs for head in artefact.heads] == [10, 5]
    assert artefact.module(torch.zeros(2, 1, 8, 8)).shape == (2, 15)
    rows = {row.title: row for row in out.results.rows}
    assert [score.task for score in rows["parent a"].evaluation.tasks] == ["upright"]
    assert rows["merged"].evaluation.joint is not None
    assert "joint" in (out.folder / "report.html").read_text()


def test_parents_that_normalise_differently_see_the_same_pixels(own_tiny: Tiny, tmp_path: Path) -> None:
    recipe = own_tiny.load("parents.b.preprocess.mean=[0.6]", "parents.b.preprocess.std=[0.2]")
    parents = load_parents(begin(recipe))
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    a, b = parents.each
    xa, xb = a.preprocess(images), b.preprocess(images)
    torch.testing.assert_close(parents.input(images), (xa + xb) / 2)
    with torch.no_grad():
        expected = (a.module(xa) + b.module(xb)) / 2
        torch.testing.assert_close(AllParents(parents, "shared").eval()(parents.input(images)), expected)
    out = run(recipe, tmp_path / "out")
    assert any("normalise differently" in note for note in out.results.notes)


# what stops it ------------------------------------------------------------------------------------


def _refused(make: Callable[[], Any]) -> str:
    with pytest.raises(UsageError) as caught:
        make()
    return str(caught.value)


def test_an_existing_folder_stops_before_any_work(
    outcome: Outcome, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datafree.pipeline.load_parents", None)
    message = _refused(lambda: run(tiny.load(), outcome.folder))
    assert message == f"{outcome.folder} exists: choose another output folder, or replace it with --overwrite"


def test_two_architectures_name_the_tensors_that_differ(own_tiny: Tiny, tmp_path: Path) -> None:
    own_tiny.write_parent("b", 3, width=8)
    message = _refused(lambda: run(own_tiny.load("parents.b.arguments.width=8"), tmp_path / "out"))
    assert message.startswith(f"{own_tiny.recipe}:2:1: parents: parents a and b are not one architecture")
    assert "stem.weight: (6, 1, 3, 3) in a, (8, 1, 3, 3) in b" in message


def test_shared_labels_need_the_same_outputs(own_tiny: Tiny, tmp_path: Path) -> None:
    message = _refused(
        lambda: run(own_tiny.load("parents.b.classes=[a, b, c, d, e, f, g, h, i, j]",
                                  "parents.a.classes=[a, b, c, d, e, f, g, h, j, i]"), tmp_path / "out")
    )  # fmt: skip
    assert message == (
        f"{own_tiny.recipe}:1:1: labels: shared labels mean that output i is the same class "
        "in all parents, but output 8 is 'j' in a and 'i' in b: say `labels: separate` or `union`, or correct `classes`"
    )


def test_too_few_images_are_found_before_the_proxies_are_made(
    tiny: Tiny, tmp_path: Path, own_cache: Path
) -> None:
    message = _refused(lambda: run(tiny.load("proxy.count=1", "merge.positions=1"), tmp_path / "out"))
    assert message.startswith("--set proxy.count=1: proxy.count: layer ")
    assert "0 rows for 9 unknowns" in message, "the one image is held out"
    assert not list(own_cache.rglob("*.safetensors"))


def test_not_a_number_in_the_weights_names_the_tensor(own_tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = own_tiny.folder / "b.safetensors"
    state = load_file(path)
    state["block.conv1.weight"][0, 0, 0, 0] = float("nan")
    save_file(state, path)
    message = _refused(lambda: run(own_tiny.load(), tmp_path / "out"))
    assert message.startswith(f"{own_tiny.recipe}:4:3: parents.b:")
    assert "block.conv1.weight" in message


LEAK = (
    "proxy.sources=[{kind: images, images: {digits: {split: test}}}]",
    "proxy.count=64",
    "evaluate=[{name: upright, images: {digits: {split: test}}}]",
)


def test_evaluation_images_among_the_proxies_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    message = _refused(lambda: run(tiny.load(*LEAK), tmp_path / "out"))
    assert "64 of the 797 evaluation images of task 'upright' are among the proxies" in message
    assert message.endswith("choose other images, or say `proxy.allow_leak: true`")
    assert _invoke("check", tiny.recipe, *(part for o in LEAK for part in ("--set", o))).exit_code == 2


def test_a_leak_that_is_allowed_is_noted(tiny: Tiny) -> None:
    work = begin(tiny.load(*LEAK, "proxy.allow_leak=true"))
    parents = load_parents(work)
    make_proxies(work, parents, load_tasks(work, parents))
    (note,) = work.progress.notes
    assert note.endswith("are among the proxies; the recipe allows it (proxy.allow_leak)")


def test_proxies_are_made_until_their_moments_settle(tiny: Tiny) -> None:
    work = begin(tiny.load("proxy.count=2000", "proxy.settle=0.3"))
    parents = load_parents(work)
    proxies = make_proxies(work, parents, load_tasks(work, parents))
    assert 128 <= len(proxies) < 2000
    (note,) = work.progress.notes
    assert note.startswith(f"proxies: {len(proxies)} images, at which the second moments have settled: ")
    assert note.endswith(" %, 30 % are allowed")


def test_a_cap_on_proxies_that_do_not_settle(tiny: Tiny) -> None:
    work = begin(tiny.load("proxy.count=200", "proxy.settle=1e-6"))
    parents = load_parents(work)
    assert len(make_proxies(work, parents, load_tasks(work, parents))) == 200
    assert "images, at which the second moments have not settled" in work.progress.notes[0]


def test_evaluation_images_in_the_oracle_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    message = _refused(
        lambda: run(tiny.load("oracle.count=200", "oracle.images.digits={split: test}"), tmp_path / "out")
    )
    assert "are among the oracle's images" in message


def test_an_oracle_that_is_too_small(tiny: Tiny, tmp_path: Path) -> None:
    message = _refused(
        lambda: run(tiny.load("oracle.count=5000", "oracle.images.digits={}"), tmp_path / "out")
    )
    assert message.startswith("--set oracle.count=5000: oracle.count: 5000 images are asked for, but digits")


def test_cuda_where_there_is_none(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = _refused(lambda: run(tiny.load(), tmp_path / "out", device="cuda"))
    assert message.startswith("--device cuda: this PyTorch sees no CUDA device")


# the commands -------------------------------------------------------------------------------------


def test_merge_prints_the_table_and_the_places(tiny: Tiny, tmp_path: Path) -> None:
    result = _invoke("merge", tiny.recipe, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[1].split() == [
        "network",
        "upright",
        "rotated",
        "average",
        *("agree", "a", "agree", "b", "agree", "own", "KL"),
        "predicted",
        "FLOPs",
        "ratio",
        "parameters",
    ]
    assert f"report    {tmp_path / 'out' / 'report.html'}" in lines
    assert "statistics" in result.stderr
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["command"]
    assert _invoke("merge", tiny.recipe, "-o", tmp_path / "out").exit_code == 2


def test_check_passes_and_makes_nothing(tiny: Tiny, own_cache: Path) -> None:
    result = _invoke("check", tiny.recipe)
    assert result.exit_code == 0, result.output
    assert "ok  parents" in result.output
    assert "noise excites few directions" in result.output
    assert not own_cache.exists()
    facts = json.loads(_invoke("check", tiny.recipe, "--json").stdout)
    assert [part["part"] for part in facts["checks"]] == [
        "recipe",
        "parents",
        "images",
        "proxies",
        "compare",
        "symmetry",
    ]


def test_plan_shows_units_and_residuals_and_writes_no_artefact(tiny: Tiny) -> None:
    result = _invoke("plan", tiny.recipe, "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert [plan["point"] for plan in shown] == ["budget 1", "budget 1.4"]
    assert all(row["width"] == row["fused"] + 2 * row["apart"] for row in shown[1]["classes"])
    assert all(row["width"] == sum(row["owners"].values()) for plan in shown for row in plan["classes"])
    text = plan_text(shown[1])
    assert "budget 1.4: " in text
    assert "block.conv1" in text


def test_eval_gives_the_numbers_of_the_merge(outcome: Outcome, tiny: Tiny) -> None:
    result = _invoke("eval", outcome.artefacts[1], tiny.recipe, "--json")
    assert result.exit_code == 0, result.output
    row = next(row for row in outcome.results.rows if row.label == "merged, budget 1.4")
    assert json.loads(result.stdout)["average"] == row.evaluation.average
    assert "worst class" in _invoke("eval", outcome.artefacts[1], tiny.recipe).stdout


def test_inspect_shows_models_recipes_and_artefacts(outcome: Outcome, tiny: Tiny) -> None:
    recipe = _invoke("inspect", tiny.recipe)
    assert recipe.exit_code == 0, recipe.output
    assert "stem.weight[out] - bn.*" in recipe.output
    model = _invoke("inspect", "torchvision:squeezenet1_1", "--input", "3x64x64", "--json")
    assert model.exit_code == 0, model.output
    assert json.loads(model.stdout)["permutable_share"] > 0.9
    artefact = _invoke("inspect", outcome.artefacts[0])
    assert artefact.stdout == (outcome.artefacts[0] / "README.md").read_text()
    assert json.loads(_invoke("inspect", outcome.artefacts[0], "--json").stdout)["name"] == "tiny, budget 1"


def test_export_runs_without_our_code(tiny: Tiny, tmp_path: Path) -> None:
    result = _invoke("merge", tiny.recipe, "-o", tmp_path / "out", "--export", "--set", "merge.budgets=[1.4]")
    assert result.exit_code == 0, result.output
    assert datafree.load(tmp_path / "out").config["point"] == {"kind": "budget", "value": 1.4}, (
        "one budget: no subfolder"
    )
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        expected = datafree.load(tmp_path / "out").module(x)
        torch.testing.assert_close(program(x), expected)
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "out" / "model.onnx"))
