"""The report, the card and the tables, from made-up results."""

from __future__ import annotations

from typing import Any

import pytest

from datafree.evaluation.evaluate import Evaluation, TaskScore
from datafree.evaluation.results import Point, Results, Row, average_of, cells, columns
from datafree.report.charts import cost_charts
from datafree.report.pages import html_report
from datafree.tables import text_table
from pleas import LayerEvidence

FINE, COARSE = Point("budget", 1.0), Point("budget", 1.25)
AVERAGED = "Averages are re-estimated"
JOINT = {True: 0.55, False: None}
RUN: dict[str, Any] = {
    "proxies": {"count": 64, "sources": [{"kind": "inversion", "count": 64, "seconds_per_1000": 31.0}]},
    "oracle": None,
    "parents": {"a": {}, "b": {}, "c": {}},
    "seed": 0,
    "device": "cpu",
    "seconds": 12.3,
    "timings": {"statistics": 3.0},
    "versions": {"python": "3.11"},
    "machine": {"platform": "Linux", "threads": 1},
    "command": "datafree merge x.yaml -o <out>",
}


def _evaluation(first: float | None, second: float | None, joint: float | None = None) -> Evaluation:
    scores = tuple(
        TaskScore(task, None, 10, value, {"0": value}, ("0", value))
        for task, value in (("upright", first), ("rotated", second))
        if value is not None
    )
    return Evaluation(scores, sum(score.accuracy for score in scores) / len(scores), joint)


def _results(
    *, labels: Any = "shared", tasks: tuple[str, ...] = ("upright", "rotated"), notes: tuple[str, ...] = ()
) -> Results:
    separate = labels == "separate"
    rows = (
        Row("parent", "a", 82_000_000, 1.0, 272_474, _evaluation(0.98, None if separate else 0.12)),
        Row("parent", "b", 82_000_000, 1.0, 272_474, _evaluation(None if separate else 0.11, 0.97)),
        Row("parent", "c", 82_000_000, 1.0, 272_474, _evaluation(0.5, None if separate else 0.5)),
        Row("ensemble", "", 246_000_000, 3.0, 817_422, _evaluation(0.99, 0.98, 0.9 if separate else None)),
        Row("baseline", "plain average", 82_000_000, 1.0, 272_474, _evaluation(0.1, 0.1), note=AVERAGED),
        Row("merged", "", 81_000_000, 0.988, 272_474, _evaluation(0.6, 0.7, JOINT[separate]), FINE),
        Row("merged", "", 101_000_000, 1.232, 340_000, _evaluation(0.8, 0.9), COARSE, predicted=0.25),
    )
    layers = {
        point: tuple(LayerEvidence(f"layer{i}.conv", 0.1 * i, 100, 10, ()) for i in range(3))
        for point in (FINE, COARSE)
    }
    table = [
        {
            "class": "1",
            "kind": "channel",
            "units": 4,
            "fused": 3,
            "apart": 1,
            "owners": {"a": 1, "b + c": 1, "a + b + c": 3},
            "width": 5,
            "reason": "",
            "couples": ["a<b"],
        }
    ]
    plan = {
        "flops": 1,
        "ratio": 1.0,
        "held_out_error": 0.5,
        "propagate": 0.7,
        "tried": [[0.0, 0.75], [0.7, 0.5]],
        "mean_residual": 0.1,
        "classes": table,
    }
    return Results("tiny", "ab" * 32, labels, tasks, rows, layers, {FINE: plan, COARSE: plan}, notes)


def test_points_name_themselves_and_their_folders() -> None:
    assert (COARSE.label, COARSE.folder, Point("apart", 0).folder) == (
        "budget 1.25",
        "budget-1.25",
        "apart-0",
    )


def test_the_table_has_accuracies_costs_and_dashes() -> None:
    results = _results()
    assert columns(results) == [
        *("network", "upright", "rotated", "average"),
        *("predicted", "FLOPs", "ratio", "parameters"),
    ]
    merged = [cells(results, row) for row in results.of_kind("merged")]
    assert merged == [
        ["merged, budget 1", "60.0", "70.0", "65.0", "-", "81 M", "0.988", "272 k"],
        ["merged, budget 1.25", "80.0", "90.0", "85.0", "0.250", "101 M", "1.232", "340 k"],
    ]
    separate = _results(labels="separate")
    assert columns(separate)[3:5] == ["average", "joint"]
    assert cells(separate, separate.rows[0])[1:5] == ["98.0", "-", "-", "-"]
    assert average_of(separate, separate.rows[0]) is None


def test_rows_are_named_by_what_they_are() -> None:
    rows = _results().rows
    assert [row.title for row in rows] == [
        *("parent a", "parent b", "parent c"),
        *("ensemble", "plain average", "merged", "merged"),
    ]
    assert rows[-1].label == "merged, budget 1.25"
    assert rows[0].to_dict()["kind"] == "parent"
    assert rows[0].to_dict()["name"] == "parent a"
    assert rows[-1].to_dict()["point"] == {"kind": "budget", "value": 1.25}


def test_text_table_lines_up() -> None:
    text = text_table(["network", "FLOPs"], [["a", "1 M"], ["merged", "10 M"]])
    assert text.splitlines() == ["network  FLOPs", "-------  -----", "a          1 M", "merged    10 M"]


def test_the_page_of_plain_results_is_whole_and_escapes_text() -> None:
    page = html_report(_results(notes=("a <note>", "x (proxy.allow_leak)")), RUN, "name: tiny & co\n")
    assert page.count('role="img"') == 5, "three panels of accuracy, the error, the residuals"
    assert "3 networks merged into one, from\n64 proxy images" in page
    assert "held-out proxies 0.500 (propagate 0.7; tried 0: 0.750, 0.7: 0.500)" in page
    assert "a &lt;note&gt;" in page
    assert "a&lt;b" in page
    assert "name: tiny &amp; co" in page
    assert "-o &lt;out&gt;" in page
    assert '<p class="warn">x (proxy.allow_leak).</p>' in page, (
        "a leak that was let through is said at the top"
    )
    assert '<tr class="ours"><td>merged, budget 1</td>' in page


@pytest.mark.parametrize("labels", ["shared", "separate"])
def test_pictures_exist_for_every_kind_of_labels(labels: str) -> None:
    charts = cost_charts(_results(labels=labels))
    assert len(charts) == (3 if labels == "shared" else 4)
    assert [key.label for key in charts[0].keys] == [
        *("parent a", "parent b", "parent c"),
        *("ensemble", "least squares", "plain averages and other methods"),
    ]


def test_nothing_evaluated_is_no_picture() -> None:
    assert cost_charts(_results(tasks=())) == []
