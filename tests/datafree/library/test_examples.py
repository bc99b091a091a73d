"""Every example in a docstring of the library runs and gives what it says."""

from __future__ import annotations

import doctest
from pathlib import Path
from types import ModuleType

import pytest
import torch

import datafree
from datafree.library import judging, merging, proxies, running
from tests.datafree.library.small import small
from tests.datafree.tiny import make_tiny


@pytest.mark.parametrize("module", [merging, proxies, judging, running], ids=lambda module: module.__name__)
def test_examples_run(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {"datafree": datafree, "torch": torch, "a": small(1), "b": small(2)}
    found = [test for test in doctest.DocTestFinder().find(module, globs=names) if test.examples]
    assert found
    for test in found:
        said: list[str] = []
        failed = doctest.DocTestRunner().run(test, out=said.append).failed
        assert not failed, "".join(said)


def test_everything_public_says_what_it_raises_and_has_an_example() -> None:
    for name in ("merge", "invert", "diagnose", "refine", "evaluate", "run"):
        text = getattr(datafree, name).__doc__
        assert "Raises" in text, name
        assert ">>>" in text, name
