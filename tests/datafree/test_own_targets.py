"""Parents that contradict each other: what `check`, a merge and its card say, and what the targets then are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from datafree.cli import main
from datafree.pipeline import run
from pleas.statistics import domains
from tests.datafree.tiny import Tiny, make_tiny

CONTRADICTS = "parents contradict each other on each other's proxies"
ONE = (
    "merge={budgets: [1.0], positions: 16}",
    "refine={steps: 2, batch: 16, holdout: 0.5}",
    "proxy.count=128",
)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """Two networks that, by these thresholds, contradict each other on noise."""
    monkeypatch.setattr(domains, "FOREIGN", 0.0)
    monkeypatch.setattr(domains, "OVERRULED", 2.0)
    monkeypatch.setenv("DATAFREE_CACHE", str(tmp_path / "cache"))
    return make_tiny(tmp_path / "tiny")


def checked(tiny: Tiny) -> str:
    options = [part for setting in ONE for part in ("--set", setting)]
    result = CliRunner().invoke(main, ["check", str(tiny.recipe), *options])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_a_contradiction_is_said_and_each_parent_is_followed_on_its_own_images(
    tiny: Tiny, tmp_path: Path
) -> None:
    assert CONTRADICTS not in checked(tiny)  # there are no proxies yet, and check makes none
    outcome = run(tiny.load(*ONE), tmp_path / "out")
    said = checked(tiny)
    assert f"agreement 128 cached proxies: {CONTRADICTS}" in said
    assert f"note: {CONTRADICTS}: on those of a, b agrees with it on" in said

    (merged,) = outcome.merged
    assert merged.result.targets == "own"
    assert merged.refined is not None
    assert any(note.startswith(CONTRADICTS) for note in merged.refined["notes"])
    (ensemble,) = outcome.results.of_kind("ensemble")
    assert ensemble.note.startswith(CONTRADICTS)
    assert CONTRADICTS in (tmp_path / "out" / "README.md").read_text()
    plans = json.loads((tmp_path / "out" / "metrics.json").read_text())["plans"]
    assert [plan["targets"] for plan in (plans.values() if isinstance(plans, dict) else plans)] == ["own"]

    again = run(tiny.load(*ONE), tmp_path / "again")  # from the store
    assert again.merged[0].result.targets == "own"
    assert again.results.of_kind("ensemble")[0].note == ensemble.note

    mean = ("merge.targets=mean", "refine.targets=mean")
    plain = run(tiny.load(*ONE, *mean), tmp_path / "mean")
    assert plain.merged[0].result.targets == "mean"
    assert plain.results.of_kind("ensemble")[0].note == ""
