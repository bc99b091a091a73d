"""Sections, paths and seeds."""

from __future__ import annotations

from pathlib import Path

import pydantic
import pytest

from datafree.errors import UsageError
from datafree.seeds import derive_seed
from datafree.spec import Spec, resolve_path


class _Section(Spec):
    scale: float = 1.0


def test_sections_refuse_unknown_keys_nan_and_changes() -> None:
    with pytest.raises(pydantic.ValidationError, match="Extra inputs are not permitted"):
        _Section.model_validate({"sclae": 1})
    with pytest.raises(pydantic.ValidationError, match="finite number"):
        _Section(scale=float("nan"))
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        _Section().scale = 2.0


def test_paths_start_from_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "project" / "recipes"
    monkeypatch.setenv("DATAFREE_TEST_ROOT", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DATAFREE_DATA", raising=False)
    assert resolve_path("x.npz", base) == base / "x.npz"
    assert resolve_path("../benchmarks/x.py", base) == tmp_path / "project" / "benchmarks" / "x.py"
    assert resolve_path("/abs/x", base) == Path("/abs/x")
    assert resolve_path("~/x", base) == tmp_path / "home" / "x"
    assert resolve_path("${DATAFREE_TEST_ROOT}/x", base) == tmp_path / "elsewhere" / "x"
    assert resolve_path("${DATAFREE_DATA}/data/x", base) == tmp_path / "shared" / "data" / "x"
    monkeypatch.setenv("DATAFREE_DATA", str(tmp_path / "data"))
    assert resolve_path("${DATAFREE_DATA}/x", base) == tmp_path / "data" / "x"


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_is_not_set(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATAFREE_ABSENT", raising=False)
    if value is not None:
        monkeypatch.setenv("DATAFREE_ABSENT", value)
    with pytest.raises(UsageError) as caught:
        resolve_path("${DATAFREE_ABSENT}/x", Path("/"))
    assert str(caught.value) == (
        "the environment variable 'DATAFREE_ABSENT' in '${DATAFREE_ABSENT}/x' is not set: set it (export "
        "DATAFREE_ABSENT=...), or write the path out in the recipe"
    )


def test_seeds_are_fixed_for_ever_and_differ_by_name() -> None:
    assert derive_seed(0, "merge") == 4426635959612434025
    seeds = {
        derive_seed(seed, *names)
        for seed in (0, 1)
        for names in ((), ("a",), ("a", "b"), ("ab",), ("b", "a"))
    }
    assert len(seeds) == 10
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\0b", "'a\\x00b' can be no path (embedded null byte): give another"),
        ("x" * 5000, f"'{'x' * 97}...' can be no path (File name too long): give another"),
        (
            "~nobody-of-this-name/x",
            "'~nobody-of-this-name/x' can be no path (Could not determine home directory.)",
        ),
        ("loop/x", "'loop/x' can be no path ("),
    ],
)
def test_text_that_can_be_no_path(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError) as caught:
        resolve_path(text, tmp_path)
    assert str(caught.value).startswith(message)
