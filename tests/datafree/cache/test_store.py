"""Stages on disk: found by meaning, whole or absent, damage noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from datafree.cache.store import (
    DamagedStage,
    Store,
    cache_folder,
    content_hash,
    plain_tensors,
    stage_key,
    syntax_without_words,
    write_safetensors,
)
from datafree.errors import RunError


def _tensors() -> dict[str, torch.Tensor]:
    shared = torch.randn(4, 4, dtype=torch.float64)
    return {
        "half": torch.randn(3, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 2),
        "scalar": torch.tensor(3),
        "transposed": shared.t(),
        "view": shared[1:3],
        "flags": torch.tensor([True, False]),
    }


def test_a_stage_comes_back_exactly(tmp_path: Path) -> None:
    store, tensors = Store(tmp_path), _tensors()
    key = stage_key("statistics", {"ridge": 0.1})
    assert store.read("statistics", key) is None
    store.write("statistics", key, tensors, {"rows": [1, 2]})
    stage = store.read("statistics", key)
    assert stage is not None
    assert stage.value == {"rows": [1, 2]}
    assert stage.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert stage.tensors[name].dtype == tensor.dtype
        assert torch.equal(stage.tensors[name], tensor), name
    assert [path.name for path in (tmp_path / "statistics").iterdir()] == [f"{key}.safetensors"], (
        "nothing temporary left"
    )
    assert store.size() == store.path("statistics", key).stat().st_size


def test_the_same_content_is_the_same_bytes(tmp_path: Path) -> None:
    tensors, metadata = _tensors(), {name: name * 3 for name in "edcbafgh"}
    for name in ("one", "two"):
        write_safetensors(tmp_path / name, plain_tensors(tensors), metadata)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with safe_open(tmp_path / "one", framework="pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("transposed"), tensors["transposed"])


def test_the_key_depends_on_the_meaning_only() -> None:
    key = stage_key("statistics", {"a": 1, "b": [2.0]})
    assert key == stage_key("statistics", {"b": [2.0], "a": 1})
    assert key != stage_key("statistics", {"a": 1, "b": [2.5]})
    assert key != stage_key("matching", {"a": 1, "b": [2.0]})


def test_content_hash_sees_names_types_shapes_and_bytes() -> None:
    base = content_hash({"a": torch.zeros(2, 3)})
    assert base == content_hash({"a": torch.zeros(2, 3)})
    others = [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3).int()},
        {"a": torch.ones(2, 3)},
    ]
    assert base not in [content_hash(other) for other in others]


@pytest.mark.parametrize("cut", [5, 60, -1])
def test_a_truncated_stage_is_noticed(tmp_path: Path, cut: int) -> None:
    store, key = Store(tmp_path), stage_key("s", {})
    store.write("s", key, _tensors())
    path = store.path("s", key)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DamagedStage, match="cannot be read") as caught:
        store.read("s", key)
    assert str(path) in str(caught.value)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    store, key = Store(tmp_path), stage_key("s", {})
    store.write("s", key, _tensors())
    path = store.path("s", key)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DamagedStage, match="does not have the content it was written with"):
        store.read("s", key)


def test_another_stage_under_the_name_is_noticed(tmp_path: Path) -> None:
    store, key, other = Store(tmp_path), stage_key("s", {}), stage_key("s", {"x": 1})
    store.write("s", other, _tensors())
    store.path("s", other).rename(store.path("s", key))
    with pytest.raises(DamagedStage, match="holds another stage"):
        store.read("s", key)


def test_an_unwritable_cache_says_what_to_do(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(
        RunError, match=r"cannot be written .*: free some space, or set DATAFREE_CACHE to another folder"
    ):
        Store(blocked / "cache").write("s", stage_key("s", {}), _tensors())


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DATAFREE_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("DATAFREE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "datafree"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "datafree"


def test_words_are_no_part_of_the_code() -> None:
    """A mended docstring or comment does not void hours of work; any other change does."""
    plain = 'def f(x):\n    """Twice."""\n    return 2 * x  # why\n'
    told = 'def f(x):\n    """Two times x."""\n\n    return 2 * x\n'
    assert syntax_without_words(plain) == syntax_without_words(told)
    assert syntax_without_words(plain) != syntax_without_words(plain.replace("2", "3"))
    assert syntax_without_words("x = 'a'") != syntax_without_words("x = 'b'")
