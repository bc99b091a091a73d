"""The refine stage in a whole run: its own rows and artefacts, reported apart, and never lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import datafree
from datafree.cache.store import CACHE_VARIABLE, Store
from datafree.errors import UsageError
from datafree.pipeline import run
from datafree.recipe.file import load_recipe
from datafree.recipe.schema import RefineSpec
from datafree.report.charts import refine_charts
from datafree.stages.refining import AUGMENT, _joined, _parted
from pleas.refine import RefineSettings
from tests.datafree.tiny import Tiny, make_tiny

REFINE = ("refine.steps=6", "refine.batch=8", "refine.rate=0.003", "proxy.count=96")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return make_tiny(tmp_path / "tiny")


def test_refined_networks_are_rows_and_artefacts_of_their_own(tiny: Tiny, tmp_path: Path) -> None:
    outcome = run(tiny.load(*REFINE), tmp_path / "out")
    names = [row.title for row in outcome.results.rows]
    assert names.count("merged") == names.count("refined") == 2
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert set(record["refine"]) == {"budget 1", "budget 1.4"}
    for told in record["refine"].values():
        assert told["steps"] <= 6
        assert told["refined"]["loss"] <= told["start"]["loss"], "never worse than its start"
    assert "Refining" in (tmp_path / "out" / "report.html").read_text()
    loaded = datafree.load(tmp_path / "out" / "budget-1").module
    expected = outcome.merged[0].result.module
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(x), expected(x))


FURTHER = "refine.proxies={count: 40, sources: [{kind: noise, share: 0.3}, {kind: procedural, share: 0.7}]}"


def test_further_proxies_are_seen_by_refining_alone(tiny: Tiny, tmp_path: Path) -> None:
    plain = run(tiny.load(*REFINE), tmp_path / "plain")
    more = run(tiny.load(*REFINE, FURTHER), tmp_path / "more")
    record = json.loads((tmp_path / "more" / "run.json").read_text())
    assert [source["count"] for source in record["proxies"]["sources"]] == [96]
    assert [(source["kind"], source["count"]) for source in record["proxies"]["for_refining"]] == [
        ("noise", 12),
        ("procedural", 28),
    ]
    assert "procedural, for refining only" in (tmp_path / "more" / "report.html").read_text()
    merged = [
        [row.predicted for row in outcome.results.rows if row.kind == "merged"] for outcome in (plain, more)
    ]
    assert merged[0] == merged[1], "least squares sees the merge's own proxies"
    starts = [
        outcome.merged[0].refined["start"]["loss"] for outcome in (plain, more) if outcome.merged[0].refined
    ]
    assert starts[0] != starts[1], "the held-out images are from both"


def test_proxies_for_refining_are_checked(tiny: Tiny) -> None:
    with pytest.raises(UsageError, match=r"refine: `settle` is about the second moments"):
        tiny.load(*REFINE, "refine.proxies={count: 8, settle: 0.1, sources: [{kind: noise}]}")


def test_accuracy_against_refine_time_is_in_the_report(tiny: Tiny, tmp_path: Path) -> None:
    rows = {
        row.label: row for row in run(tiny.load(*REFINE, "refine.curve=6"), tmp_path / "out").results.rows
    }
    refined = json.loads((tmp_path / "out" / "run.json").read_text())["refine"]
    for label, told in refined.items():
        curve, history = told["curve"], told["history"]
        assert [look["seconds"] for look in curve] == [check["seconds"] for check in history]
        assert curve[0]["average"] == rows[f"merged, {label}"].evaluation.average
        checked = [check["evidence"] for check in history]
        if told["refined"] in checked:  # a network on the line between two checks is not on the curve
            best = checked.index(told["refined"])
            assert curve[best]["average"] == rows[f"refined, {label}"].evaluation.average
    run(tiny.load(*REFINE, "refine.curve=0"), tmp_path / "without")
    plain = json.loads((tmp_path / "without" / "run.json").read_text())["refine"]
    assert all(told["curve"] == [] for told in plain.values())
    assert [len(refine_charts(each)) for each in (refined, plain)] == [2, 1], "accuracy has its own axes"


def test_an_interrupted_refining_goes_on_to_the_same_bits(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.load(*REFINE)
    whole = run(recipe, tmp_path / "whole")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "other"))
    write, written = Store.write, []

    def interrupted(store: Store, stage: str, *rest: object) -> None:
        write(store, stage, *rest)  # type: ignore[arg-type]
        written.append(stage)
        if written.count("refining") == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(Store, "write", write)
    again = run(recipe, tmp_path / "again")
    for first, second in zip(whole.merged, again.merged, strict=True):
        for name, value in first.result.module.state_dict().items():
            assert torch.equal(value, second.result.module.state_dict()[name])
    assert not list((tmp_path / "other" / "refining").glob("*.safetensors")), (
        "what is finished leaves no state"
    )


def test_a_nested_state_survives_the_store() -> None:
    state = {"a": [torch.arange(3), {"b": 1.5, 7: None}], "c": "text", "d": {"e": torch.zeros(2)}}
    tensors, plain = _parted(state)
    joined = _joined(json.loads(json.dumps(plain)), tensors)
    assert torch.equal(joined["a"][0], state["a"][0])  # type: ignore[index]
    assert joined["a"][1] == {"b": 1.5, 7: None}
    assert joined["c"] == "text"
    assert torch.equal(joined["d"]["e"], torch.zeros(2))


def test_steps_and_minutes_together_are_refused_where_they_stand(tiny: Tiny) -> None:
    with pytest.raises(Exception, match=r"refine.*give `steps` or `minutes`, not both"):
        load_recipe(tiny.recipe, ("refine.steps=6", "refine.minutes=1"))


def test_a_network_that_is_its_parents_already_is_left_as_it_is(tiny: Tiny, tmp_path: Path) -> None:
    outcome = run(tiny.load(*REFINE, "merge.budgets=[1.0, 2.0]"), tmp_path / "out")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert set(record["refine"]) == {"budget 1"}
    apart = [row for row in outcome.results.rows if row.kind == "refined" and row.ratio > 1.5]
    assert len(apart) == 1
    assert "budget 2: it already computes what its parents do" in apart[0].note
    merged = next(
        row for row in outcome.results.rows if row.title == "merged" and row.point == apart[0].point
    )
    assert merged.evaluation == apart[0].evaluation


def test_a_recipe_and_the_library_have_the_same_defaults() -> None:
    assert (
        RefineSettings(**RefineSpec().model_dump(exclude={"augment", "proxies", "fresh", "curve"}))
        == RefineSettings()
    )


@pytest.mark.parametrize("name", ["shift", "light"])
def test_views_depend_on_their_generator_alone(name: str) -> None:
    augment = AUGMENT[name]
    assert augment is not None
    images = torch.randint(0, 256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    random = torch.get_rng_state()
    seen = [augment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert seen[0].dtype == torch.uint8
    assert seen[0].shape == images.shape


def losses(tiny: Tiny, out: Path, *changes: str) -> list[float]:
    """On held-out proxies, at every check, of the one network refined: whether it was kept in the end or not."""
    refined = run(tiny.load(*REFINE, "merge.budgets=[1.0]", *changes), out).record["refine"]
    return [check["evidence"]["loss"] for check in refined["budget 1"]["history"]]


def test_the_recipe_chooses_the_views(tiny: Tiny, tmp_path: Path) -> None:
    found = [losses(tiny, tmp_path / name, f"refine.augment={name}") for name in AUGMENT]
    assert len({loss[0] for loss in found}) == 1, "they start alike"
    assert len({tuple(loss) for loss in found}) == len(AUGMENT)


def test_new_proxies_are_looked_for_while_refining(tiny: Tiny, tmp_path: Path) -> None:
    inverted = "proxy.sources=[{kind: inversion, steps: 2}]"
    found = [
        losses(tiny, tmp_path / "new", inverted, "refine.fresh={rounds: 2, count: 16}"),
        losses(tiny, tmp_path / "plain", inverted),
    ]
    assert found[0][0] == found[1][0]
    assert found[0] != found[1]


def test_new_proxies_need_a_source_that_inverts(tiny: Tiny) -> None:
    with pytest.raises(Exception, match=r"refine\.fresh looks for new images by inversion"):
        load_recipe(tiny.recipe, ("refine.steps=6", "refine.fresh={}", "proxy.sources=[{kind: noise}]"))
