"""A recipe's `base:`: the network that all parents were fine-tuned from, loaded and checked but no parent."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from datafree.cli import main
from datafree.errors import UsageError
from datafree.pipeline import run
from datafree.stages import begin, load_parents, trace_parents
from tests.datafree.tiny import Tiny, make_tiny

BASE = 'base={model: "python:net.py:net", weights: base.safetensors}'


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    tiny = make_tiny(tmp_path_factory.mktemp("siblings"))
    base = tiny.write_parent("base", 1)
    tiny.write_parent("other_head", 3, num_classes=100)
    tiny.write_parent("wide", 3, width=7)
    network = tiny.network()
    from safetensors.torch import load_file

    for number, name in enumerate("ab"):  # siblings: the base and a little besides
        generator = torch.Generator().manual_seed(number)
        state = load_file(base)
        for key, value in state.items():
            if key in dict(network.named_parameters()):
                state[key] = value + 0.02 * torch.randn(value.shape, generator=generator)
        save_file(state, tiny.folder / f"{name}.safetensors")
    return tiny


def checked(tiny: Tiny, *settings: str) -> Result:
    options = [part for setting in settings for part in ("--set", setting)]
    return CliRunner().invoke(main, ["check", str(tiny.recipe), *options])


def test_check_reads_the_base(tiny: Tiny) -> None:
    result = checked(tiny, BASE)
    assert result.exit_code == 0, result.output
    assert "ok  base       python:net.py:net, the parents' own architecture" in result.output


def test_it_is_no_parent_and_may_have_another_head(tiny: Tiny) -> None:
    other = BASE.replace("base.safetensors", "other_head.safetensors, arguments: {num_classes: 100}")
    work = begin(tiny.load(other), "cpu")
    loaded = load_parents(work)
    assert loaded.names == ("a", "b")
    assert loaded.base is not None
    assert loaded.base.outputs == 100
    assert loaded.base.preprocess == loaded.first.preprocess
    networks = trace_parents(work, loaded)
    assert networks.count == 2
    assert networks.base_state is not None
    assert networks.base_state["head.weight"].shape == (100, 6)
    assert any("the base has another head than the parents" in note for note in networks.notes)


def test_a_base_of_another_architecture_is_one_located_error(tiny: Tiny) -> None:
    result = checked(tiny, BASE.replace("base.safetensors", "wide.safetensors, arguments: {width: 7}"))
    assert result.exit_code == 2
    assert (
        "base: the base is no network that parent a was fine-tuned from; tensors that differ" in result.stderr
    )
    assert re.search(r"stem\.weight: \(6, 1, 3, 3\) in a, \(7, 1, 3, 3\) in the base", result.stderr)


def test_what_its_section_got_wrong_is_said_there(tiny: Tiny) -> None:
    result = checked(tiny, BASE.replace("base.safetensors", "gone.safetensors"))
    assert result.exit_code == 2
    assert "base: the base: " in result.stderr
    assert "gone.safetensors" in result.stderr
    with pytest.raises(UsageError, match=r"base\.preprocess: unknown key"):
        tiny.load(BASE.replace("weights:", "preprocess: {size: 8}, weights:"))


def test_methods_of_task_vectors_are_refused_without_a_base_and_checked_with_one(tiny: Tiny) -> None:
    result = checked(tiny, "compare=[average, ties]")
    assert result.exit_code == 2
    assert (
        "compare.1: TIES cannot run: it needs the network that all parents were fine-tuned from: give `base`"
        in result.stderr
    )
    result = checked(tiny, "compare=[average, {method: ties, keep: 0.3}]", BASE)
    assert result.exit_code == 0, result.output
    assert "ok  compare    plain average, TIES (keep 0.3)" in result.output


def test_siblings_keep_their_units_and_the_record_names_the_base(tiny: Tiny, tmp_path: Path) -> None:
    methods = "compare=[task_arithmetic, iso_c, {method: adamerging, steps: 2}]"
    recipe = tiny.load(BASE, methods, "merge.budgets=[1.0]", "evaluate=[]", "proxy.count=32")
    outcome = run(recipe, tmp_path / "out", device="cpu")
    assert (
        "a common base: all 12 units are best where they are, and none was permuted" in outcome.results.notes
    )
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert list(record["parents"]) == ["a", "b"]
    assert record["base"]["weights"] == "base.safetensors"
    names = [row.name for row in outcome.results.rows if row.kind == "comparator"]
    assert names == ["task arithmetic", "Iso-C", "AdaMerging (steps 2)"]
    resolved = (tmp_path / "out" / "recipe.resolved.yaml").read_text()
    assert "base.safetensors" in resolved
