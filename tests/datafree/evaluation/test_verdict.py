"""What is said about a run, from made-up rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from datafree.evaluation.evaluate import Evaluation, TaskScore
from datafree.evaluation.fidelity import Fidelity
from datafree.evaluation.results import Kind, Point, Results, Row, Verdict
from datafree.evaluation.verdict import verdict

GOOD, POOR = {"1 inversion": "good"}, {"1 inversion": "poor"}
NOTHING = Evaluation((), None)


def scored(accuracy: float) -> Evaluation:
    return Evaluation((TaskScore("t", None, 10, accuracy, {"0": accuracy}, ("0", accuracy)),), accuracy)


def close(a: float, b: float) -> Fidelity:
    return Fidelity(40, {"a": a, "b": b}, {"a": 0.1, "b": 0.1}, 0.1)


def row(kind: Kind, ratio: float, name: str = "", *, is_: float | tuple[float, float]) -> Row:
    found, near = (NOTHING, close(*is_)) if isinstance(is_, tuple) else (scored(is_), close(1, 1))
    point = Point("budget", ratio) if kind in ("merged", "refined", "oracle") else None
    return Row(kind, name, 100, ratio, 10, found, point, fidelity=near)


def say(*rows: Row, looks: Mapping[str, str] = GOOD, refined: bool = False) -> Verdict:
    tasks = ("t",) if rows[-1].evaluation.tasks else ()
    found = verdict(Results("x", "ab", "shared", tasks, rows, {}, {}, ()), looks, refined=refined)
    assert found is not None
    return found


LABELLED = (row("parent", 1, "a", is_=0.6), row("parent", 1, "b", is_=0.5), row("ensemble", 2, is_=0.98))


def test_the_smallest_network_near_the_ensemble_needs_nothing_more() -> None:
    merged = [row("merged", r, is_=v) for r, v in ((1.0, 0.8), (1.25, 0.94), (1.5, 0.96), (2.0, 0.98))]
    found = say(*LABELLED, *merged)
    assert found.text == (
        "merged, budget 1.25 is the smallest network within 5 % of the ensemble: accuracy 94.0 %, 96 % of the "
        "ensemble's 98.0 %, at 1.25 times one parent's multiply-adds; the proxies look good to the parents."
    )
    assert found.row is merged[1]
    assert found.share == pytest.approx(0.94 / 0.98)


def test_poor_proxies_are_named_with_the_remedy_and_a_larger_budget() -> None:
    merged = [row("merged", r, is_=v) for r, v in ((1.0, 0.4), (1.25, 0.7), (2.0, 0.98))]
    found = say(*LABELLED, *merged, looks=POOR)
    assert "merged, budget 1.25 comes closest to the ensemble: accuracy 70.0 %" in found.text
    assert "the proxies look poor to the parents." in found.text
    assert found.steps[0].startswith("Better proxies come first: photographs of any kind")
    assert found.steps[1:] == ("Try a larger budget: merge.budgets go up to 2",), (
        "one that keeps all apart is the ensemble itself, and refining on poor proxies is not advised"
    )


def test_a_parent_that_beats_every_merge_is_said() -> None:
    found = say(*LABELLED, row("merged", 1.0, is_=0.49), looks={"1 noise": "poor"}, refined=True)
    assert found.steps[0] == (
        "parent a alone has accuracy 60.0 %, more than every merged network: take it where one network must serve"
    )
    assert found.steps[1].startswith("Better proxies come first: images inverted from the parents")
    assert found.steps[2] == "Try a larger budget: merge.budgets go up to 2"


def test_an_ensemble_that_is_nothing_to_aim_at_is_said() -> None:
    parents = (row("parent", 1, "a", is_=0.6), row("parent", 1, "b", is_=0.6), row("ensemble", 2, is_=0.6))
    found = say(*parents, row("merged", 1.0, is_=0.6))
    assert found.steps == (
        "The ensemble itself is no better than one parent alone: these parents do not complete each other",
    )
    apart = row("parent", 1, "a", is_=(1.0, 0.0)), row("ensemble", 2, is_=(0.0, 0.0))
    found = say(*apart, row("parent", 1, "b", is_=(0.0, 1.0)), row("merged", 1.0, is_=(0.0, 0.0)))
    assert "comes closest to the ensemble: agreement 0.0 %" in found.text
    assert "Even the ensemble agrees with its parents on 0 % of the proxies" in found.text


@pytest.mark.parametrize(
    ("real", "said"),
    [(0.71, "Real images would give 71.0 % here: better proxies come first"),
     (0.70, "Real images would give 70.0 % here: the size is the limit, not the proxies")],
)  # fmt: skip
def test_the_oracle_tells_what_the_limit_is(real: float, said: str) -> None:
    found = say(*LABELLED, row("merged", 1.0, is_=0.7), row("oracle", 1.0, is_=real), looks=POOR)
    assert found.steps[0].startswith(said)


def test_without_labels_agreement_decides() -> None:
    parents = [row("parent", 1, name, is_=pair) for name, pair in (("a", (1.0, 0.4)), ("b", (0.4, 1.0)))]
    merged = [row("merged", 1.0, is_=(0.6, 0.62)), row("merged", 1.4, is_=(0.7, 0.72))]
    found = say(*parents, row("ensemble", 2, is_=(0.8, 0.8)), *merged)
    assert found.measure == "agreement"
    assert found.text.startswith(
        "merged, budget 1.4 comes closest to the ensemble: agreement 71.0 % with the parents on 40 held-out proxies, "
        "89 % of the ensemble's 80.0 %"
    )
    assert found.steps[-1] == (
        "No labels were given: accuracy is not known before there are tasks under `evaluate`, and 40 images are few: "
        "raise proxy.count"
    )
    assert not any("alone" in step for step in found.steps)


def test_the_parent_whose_image_it_is_decides_where_it_is_known() -> None:
    def owned(one: Row, own: float) -> Row:
        assert one.fidelity is not None
        return replace(one, fidelity=replace(one.fidelity, own=own))

    rows = [row("parent", 1, name, is_=(0.5, 0.5)) for name in "ab"]
    rows += [owned(row("ensemble", 2, is_=(0.5, 0.5)), 0.9), owned(row("merged", 1.0, is_=(0.4, 0.4)), 0.88)]
    found = say(*rows)
    assert "agreement 88.0 % with the parent whose image it is on 40 held-out proxies" in found.text


def test_a_run_with_nothing_to_compare_has_no_verdict() -> None:
    rows = (row("parent", 1, "a", is_=0.6),)
    assert verdict(Results("x", "ab", "shared", ("t",), rows, {}, {}, ()), GOOD, refined=False) is None
