"""`datafree.run` takes a recipe from a file, a dictionary or an object, with the same numbers and the same errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import datafree
from datafree.errors import UsageError
from datafree.library.running import as_recipe_file
from tests.datafree.tiny import make_tiny


def test_a_recipe_may_be_a_path_a_dictionary_or_an_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_tiny(tmp_path / "tiny")
    monkeypatch.chdir(tiny.folder)
    content = yaml.safe_load(tiny.recipe.read_text())
    content["parents"]["a"]["weights"] = Path("a.safetensors")
    content["merge"]["budgets"] = (1.0,)
    outcome = datafree.run(content, tmp_path / "out")
    assert repr(outcome) == f"Outcome({tmp_path / 'out'}: 1 network, budget 1)"
    assert outcome.plot().axes
    assert outcome.rows()[-1]["network"] == "merged, budget 1"
    expected = as_recipe_file("tiny.yaml", ["merge.budgets=[1.0]"])
    for same in (content, expected, expected.recipe, str(tiny.recipe)):
        found = as_recipe_file(same, ["merge.budgets=[1.0]"] if isinstance(same, str) else ())
        assert found.recipe.fingerprint() == expected.recipe.fingerprint()
        assert found.base == expected.base
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["rows"][0]["name"] == "parent a"


def test_mistakes_have_a_place(tmp_path: Path) -> None:
    content = {"name": "x", "parents": {"a": {"model": "timm:resnet18"}}}
    with pytest.raises(UsageError, match=r"recipe:\d+:\d+: parents: 1 parent: a merge takes 2 to 16"):
        datafree.run(content, tmp_path / "out")
    with pytest.raises(UsageError, match=r"recipe: parents.a is a object: a recipe holds texts"):
        datafree.run({"parents": {"a": object()}}, tmp_path / "out")
    with pytest.raises(UsageError, match=r"recipe is a int: give the path of a .yaml file, a dictionary"):
        datafree.run(3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no such recipe"):
        datafree.run(tmp_path / "none.yaml")
    assert not (tmp_path / "out").exists()
