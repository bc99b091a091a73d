"""Recipe text: YAML 1.2 scalars, places of keys, overrides, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datafree.errors import UsageError
from datafree.recipe.yaml_source import dump, override, parse, spell

TEXT = """\
name: no
parents:
  a: &shared {ridge: 1e-3, list: [1, {deep: .5}]}
  b:
    <<: *shared
    ridge: 2
"""


def test_scalars_are_yaml_1_2() -> None:
    text = "{a: no, b: 1e-3, c: 07, d: 2020-01-01, e: ~, f: true, g: -3, h: .5, i: 1_000, j: 'true'}"
    assert parse(text, "r.yaml").data == {
        "a": "no", "b": 0.001, "c": "07", "d": "2020-01-01", "e": None,
        "f": True, "g": -3, "h": 0.5, "i": "1_000", "j": "true",
    }  # fmt: skip


def test_every_key_has_its_place_and_merged_keys_the_place_they_were_written() -> None:
    source = parse(TEXT, "r.yaml")
    assert source.data["parents"]["b"] == {"ridge": 2, "list": [1, {"deep": 0.5}]}
    assert source.place(("parents", "a", "list", 1, "deep")) == "r.yaml:3:39"
    assert source.place(("parents", "b", "ridge")) == "r.yaml:6:5"
    assert source.place(("parents", "b", "list")) == "r.yaml:3:28"
    assert source.place(("parents", "b", "absent", "deeper")) == "r.yaml:4:3"
    assert str(source.error(("parents", "b"), "wrong")) == "r.yaml:4:3: parents.b: wrong"


def test_override_replaces_creates_and_indexes_and_is_named_as_the_place() -> None:
    source = override(parse(TEXT, "r.yaml"), ["parents.a.list.1.deep=[1, 2]", "new.section=x", "name=null"])
    assert source.data["parents"]["a"]["list"] == [1, {"deep": [1, 2]}]
    assert source.data["new"] == {"section": "x"}
    assert source.data["name"] is None
    assert source.place(("parents", "a", "list", 1, "deep", 0)) == "--set parents.a.list.1.deep=[1, 2]"
    assert source.place(("parents", "a", "list", 0)) == "r.yaml:3:35"


def test_override_leaves_the_original_alone() -> None:
    source = parse(TEXT, "r.yaml")
    override(source, ["parents.a.list.0=9"])
    assert source.data["parents"]["a"]["list"][0] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "r.yaml:3:1: the key 'a' is already set on line 1; keep one"),
        ("a: [1", "r.yaml:1:6: expected ',' or ']', but got '<stream end>' (while parsing a flow sequence)"),
        ("a: b: c", "r.yaml:1:5: mapping values are not allowed here"),
        ("", "r.yaml:1:1: a recipe is a mapping (`key: value` lines), but this text is empty"),
        ("- 1", "r.yaml:1:1: a recipe is a mapping (`key: value` lines), but this text is a list"),
        ("a: &x {b: *x}", "r.yaml:1:4: this alias contains itself"),
        ("1: a", "r.yaml:1:1: a key must be text; put it in quotes"),
        (
            "a: \x00",
            "r.yaml:1:4: the character '\\x00' is not allowed in YAML; remove it",
        ),
        (
            "a: !!python/object/apply:os.system [ls]",
            "r.yaml:1:4: only plain data is allowed here, not the tag '!!python/object/apply:os.system'",
        ),
        ("a: !mine 3", "r.yaml:1:4: only plain data is allowed here, not the tag '!mine'"),
    ],
)
def test_text_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text, "r.yaml")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("name", "--set name: expected key.path=value, for example --set proxy.count=256"),
        ("=3", "--set =3: expected key.path=value, for example --set proxy.count=256"),
        ("a..b=3", "--set a..b=3: expected key.path=value, for example --set proxy.count=256"),
        ("name.x=3", "--set name.x=3: name is 'no', which has no key 'x' inside"),
        (
            "parents.a.list.2=3",
            "--set parents.a.list.2=3: parents.a.list is a list of 2: use an index from 0 to 1, not '2'",
        ),
        (
            "empty.0=3",
            "--set empty.0=3: empty is an empty list: give the whole list, for example empty=[...]",
        ),
        ("a=[1", "--set a=[1: the value is not valid YAML: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_overrides_that_are_refused(assignment: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        override(parse(TEXT + "empty: []\n", "r.yaml"), [assignment])
    assert str(caught.value) == message


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(alphabet=st.characters(blacklist_categories=["Cs", "Cc"])),
    st.sampled_from(
        ["no", "1e-3", "07", "true", "~", "0x1f", "<<", "=", "2020-01-01", "1:30", "- a", "a: b"]
    ),
)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text("abc<", min_size=1), inner)
)


@given(st.dictionaries(st.sampled_from(["a", "no", "1e-3", "<<"]), trees))
def test_dump_then_parse_gives_the_data_back(data: dict[str, Any]) -> None:
    assert parse(dump(data), "r.yaml").data == data


def test_spell() -> None:
    assert spell(("proxy", "sources", 0)) == "proxy.sources.0"
