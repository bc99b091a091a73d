"""Other methods beside ours in a run: their rows, what cannot run, what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import pleas
from datafree.cli import main
from datafree.errors import UsageError
from datafree.pipeline import run
from datafree.recipe.comparing import SPECS
from datafree.stages import begin, choose_methods, load_parents, trace_parents
from pleas.comparators import METHODS
from pleas.comparators.regmean import RegMean
from tests.datafree.tiny import Tiny, make_tiny

COMPARE = "compare=[{method: regmean, off_diagonal: 0.8}, {method: average, repair: closed}]"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def test_methods_stand_in_the_table_and_are_kept(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = ("merge.budgets=[1.0]", COMPARE)
    out = run(tiny.load(*once), tmp_path / "one")
    rows = {row.title: row for row in out.results.rows}
    regmean, average = rows["RegMean (off_diagonal 0.8)"], rows["plain average (repair closed)"]
    assert (regmean.kind, average.kind) == ("comparator", "baseline")
    assert regmean.ratio == average.ratio == 1
    assert regmean.note == "RegMean (off_diagonal 0.8) has its batch norms re-estimated on the proxies"
    assert average.note.endswith("re-estimated in closed form from the proxies' statistics")
    record = json.loads((tmp_path / "one" / "run.json").read_text())
    assert record["compare"]["RegMean (off_diagonal 0.8)"]["settings"]["off_diagonal"] == 0.8

    def never(*_: Any) -> Any:
        raise AssertionError("it was there")

    monkeypatch.setattr(RegMean, "__call__", never)
    again = run(tiny.load(*once), tmp_path / "two")
    assert [row.to_dict() for row in again.results.rows] == [row.to_dict() for row in out.results.rows]


def test_a_method_that_cannot_run_is_refused_by_name_and_left_out_of_all(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RegMean, "most_parents", 1)
    work = begin(tiny.load("compare=[average, regmean]"))
    networks = trace_parents(work, load_parents(work))
    with pytest.raises(UsageError) as caught:
        choose_methods(work, networks)
    assert str(caught.value) == (
        "--set compare=[average, regmean]: compare.1: RegMean cannot run: it is defined for 1 parents, and there are 2"
    )
    work = begin(tiny.load("compare=[all, {method: fisher, images: 8}]"))
    chosen = choose_methods(work, networks)
    left_out = {"regmean", "regmean++"} | {name for name, one in METHODS.items() if "base" in one.needs}
    assert [one.method for one in chosen] == [*(name for name in METHODS if name not in left_out), "fisher"]
    assert work.progress.notes[0] == (
        "compare: RegMean, RegMean++ are left out: each is defined for 1 parents, and there are 2"
    )
    assert len(work.progress.notes) == 2, "and one for all that need a base"


def test_a_method_of_all_that_fails_is_said_and_the_others_stand(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise pleas.MergeFailed("it did not converge")

    monkeypatch.setattr(RegMean, "__call__", fails)
    monkeypatch.setattr("datafree.stages.comparing.SPECS", {k: SPECS[k] for k in ("average", "regmean")})
    out = run(tiny.load("merge.budgets=[1.0]", "seed=3", "compare=all"), tmp_path / "out")
    assert [row.title for row in out.results.of_kind("baseline")] == ["plain average"]
    assert "compare: RegMean is left out: it did not converge" in out.results.notes
    with pytest.raises(pleas.MergeFailed):
        run(tiny.load("merge.budgets=[1.0]", "seed=3", "compare=[regmean]"), tmp_path / "named")


def test_methods_are_listed() -> None:
    result = CliRunner().invoke(main, ["methods"])
    assert result.exit_code == 0, result.output
    for name in METHODS:
        assert f"\n{name} " in result.output
    listed = json.loads(CliRunner().invoke(main, ["methods", "--json"]).output)
    assert listed[0]["keys"] == {"repair": "proxies"}
