# ruff: noqa: E501 - messages stand here as they are printed
"""The recipe's `compare`: short and long forms, every mistake at its place, the methods' fields as keys."""

from __future__ import annotations

import dataclasses

import pytest

from datafree.errors import UsageError
from datafree.recipe.comparing import DEFAULT, SPECS
from datafree.recipe.file import parse_recipe
from pleas.comparators import METHODS
from pleas.comparators.averages import Permutation, PlainAverage
from pleas.comparators.regmean import RegMean
from tests.datafree.recipe.test_recipe import GOOD


def compared(text: str) -> list[object]:
    recipe = parse_recipe(GOOD + f"compare: {text}\n", "r.yaml").recipe
    return [spec.comparator() for spec in recipe.compare]


def test_by_default_the_two_averages_stand_in_the_table() -> None:
    assert parse_recipe(GOOD, "r.yaml").recipe.compare == DEFAULT
    assert [spec.comparator() for spec in DEFAULT] == [PlainAverage(), Permutation()]


def test_names_and_mappings() -> None:
    assert compared("[permutation, {method: regmean, off_diagonal: 0.8}]") == [
        Permutation(),
        RegMean(off_diagonal=0.8),
    ]
    assert compared("regmean") == [RegMean()]
    assert compared("[]") == []


def test_all_stands_for_every_method_and_is_resolved_as_it_stands() -> None:
    recipe = parse_recipe(GOOD + "compare: all\n", "r.yaml").recipe
    assert [spec.method for spec in recipe.compare] == ["all"]
    assert recipe.model_dump(mode="json")["compare"] == [{"method": "all"}]


def test_a_resolved_recipe_spells_the_keys_out() -> None:
    recipe = parse_recipe(GOOD + "compare: [regmean]\n", "r.yaml").recipe
    assert recipe.model_dump(mode="json")["compare"] == [
        {"method": "regmean", "repair": "proxies", "off_diagonal": 0.9, "permute": True}
    ]


def test_every_field_is_a_key_with_its_default() -> None:
    assert list(SPECS) == list(METHODS)
    for name, method in METHODS.items():
        keys = {field.name for field in dataclasses.fields(method)}
        assert set(SPECS[name].model_fields) == {"method", *keys}
        assert SPECS[name]().comparator() == method()
        assert method.legend().endswith("."), f"{name}: a legend is a sentence on one line"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[regmaen]", "r.yaml:12:11: compare.0: must be one of "),
        ("[permutation, {method: regmaen}]", "r.yaml:12:25: compare.1.method: must be "),
        ("[{method: regmean, of_diagonal: 1}]", "r.yaml:12:29: compare.0.of_diagonal: unknown key; did you mean 'off_diagonal'?"),
        ("[{off_diagonal: 1}]", "r.yaml:12:11: compare.0: the key 'method' is required"),
        ("[{method: regmean, off_diagonal: 2}]", "r.yaml:12:11: compare.0: off_diagonal = 2: must lie between 0 and 1"),
        ("[{method: average, repair: some}]", "r.yaml:12:29: compare.0.repair: must be 'none', 'proxies', 'closed' or 'rescale', not 'some'"),
        ("[average, average]", "r.yaml:12:1: compare: 'average' is there twice with the same keys: keep one"),
        ("7", "r.yaml:12:1: compare: must be a list, not 7"),
    ],
)  # fmt: skip
def test_mistakes_are_located(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        compared(text)
    if "regmaen" in text:
        assert str(caught.value).endswith("not 'regmaen'; did you mean 'regmean'?")
        message = message.replace("must be one of ", "must be ")
    assert str(caught.value).startswith(message)
