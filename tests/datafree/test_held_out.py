"""Networks are compared on proxies that nothing learnt from, with or without labels, and every warning is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from datafree.cache.store import CACHE_VARIABLE
from datafree.cli import main
from datafree.pipeline import run
from datafree.stages import (
    begin,
    gather_evidence,
    hold_out,
    load_parents,
    load_tasks,
    make_proxies,
    proxy_inputs,
    trace_parents,
)
from datafree.stages.holding import held_from_refining, unsolved
from pleas.solve.propagate import held_out
from tests.datafree.tiny import Tiny, make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path_factory.getbasetemp() / "held-out-cache"))


def test_no_layer_was_solved_and_no_refining_trained_on_them(tiny: Tiny) -> None:
    work = begin(tiny.load("proxy.count=256", "refine.steps=1"))
    parents = load_parents(work)
    proxies = make_proxies(work, parents, load_tasks(work, parents))
    held = unsolved(work, 256)
    assert torch.equal(held, held_out(256, 0.125, work.settings.seed))
    spec = work.recipe.recipe.refine
    assert spec is not None
    from_refining = held_from_refining(work, spec, [proxies])
    assert held.nonzero()[:, 0].tolist() == sorted(
        set(held.nonzero()[:, 0].tolist()) & set(from_refining.tolist())
    )
    networks = trace_parents(work, parents)
    evidence = gather_evidence(work, parents, networks, proxy_inputs(work, parents, proxies))
    found = hold_out(work, [proxies], evidence)
    assert torch.equal(found.images, proxies.batch(held.nonzero()[:, 0].tolist()))
    assert evidence.domains is not None
    assert found.owners is not None
    assert torch.equal(found.owners, evidence.domains.owners[held])


def test_without_labels_the_table_says_how_close_every_network_is(tiny: Tiny, tmp_path: Path) -> None:
    found = run(tiny.load("evaluate=[]"), tmp_path / "out").results
    shares = {row.label: row.fidelity for row in found.rows}
    assert all(close is not None and close.images == 8 for close in shares.values())
    own, both = shares["parent a"], shares["ensemble"]
    assert own is not None
    assert own.agreement["a"] == 1.0
    assert own.divergence["a"] == pytest.approx(0, abs=1e-9)
    assert both is not None
    assert both.error == pytest.approx(0, abs=1e-9)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["schema"] == 2
    assert metrics["rows"][0]["proxies"]["agreement"]["a"] == 1.0
    assert metrics["verdict"]["measure"] == "agreement"
    assert metrics["verdict"]["text"] in (tmp_path / "out" / "budget-1" / "README.md").read_text()


def test_separate_heads_stand_beside_their_own_parents(tiny: Tiny, tmp_path: Path) -> None:
    found = run(tiny.load("evaluate=[]", "labels=separate"), tmp_path / "out").results
    shares = {row.label: row.fidelity for row in found.rows}
    alone, both, merged = (shares[name] for name in ("parent b", "ensemble", "merged, budget 1"))
    assert alone is not None
    assert both is not None
    assert merged is not None
    assert alone.agreement == {"b": 1.0}
    assert both.agreement == {"a": 1.0, "b": 1.0}
    assert set(merged.agreement) == {"a", "b"}


def test_the_terminal_says_the_verdict_and_every_note(tiny: Tiny, tmp_path: Path) -> None:
    arguments = ["merge", str(tiny.recipe), "-o", str(tmp_path / "out"), "--set", "evaluate=[]"]
    result = CliRunner().invoke(main, [*arguments, "--set", "parents.b.preprocess.mean=[0.6]"])
    assert result.exit_code == 0, result.output
    heading = result.stdout.splitlines()[1]
    columns = ("agree", "a", "agree", "b", "agree", "own", "KL", "predicted", "FLOPs", "ratio", "parameters")
    assert heading.split() == ["network", *columns]
    assert "\nverdict: merged, budget 1" in result.stdout
    assert "the proxies look poor to the parents. " in result.stdout
    assert "Better proxies come first: images inverted from the parents" in result.stdout
    for note in json.loads((tmp_path / "out" / "metrics.json").read_text())["notes"]:
        assert f"note: {note}" in result.stderr
