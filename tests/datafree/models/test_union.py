"""The union of the parents' classes, by name."""

from __future__ import annotations

import pytest
from torch import nn

from datafree.errors import UsageError
from datafree.images.preprocess import Preprocess
from datafree.library.merging import trace_networks
from datafree.models.parent import Parent
from datafree.models.union import union_of
from pleas import MergeSettings


def parent(name: str, classes: tuple[str, ...] | None) -> Parent:
    preprocess = Preprocess((8, 8), (0.5,), (0.5,), "bilinear")
    return Parent(name, nn.Identity(), preprocess, len(classes or ()), classes, "test", {}, None, name)


def test_classes_of_one_name_are_one_output_in_the_order_of_first_mention() -> None:
    found = union_of(
        [parent("a", ("cat", "dog")), parent("b", ("fox", "dog", "owl")), parent("c", ("owl", "cat"))]
    )
    assert found.classes == ("cat", "dog", "fox", "owl")
    assert found.places == ((0, 1), (2, 1, 3), (3, 0))
    assert found.notes == ()


def test_names_that_differ_by_spelling_only_are_two_outputs_and_a_note() -> None:
    found = union_of([parent("a", ("Polar bear", "dog")), parent("b", ("polar_bear",))])
    assert found.classes == ("Polar bear", "dog", "polar_bear")
    assert found.notes == (
        "the classes 'Polar bear' and 'polar_bear' are two outputs of the union: where they are one, spell them alike",
    )


def test_classes_have_to_be_known_of_every_parent_and_told_apart() -> None:
    with pytest.raises(UsageError, match=r"b has none: give `parents\.b\.classes`") as caught:
        union_of([parent("a", ("cat",)), parent("b", None)])
    assert caught.value.key == ("parents", "b")
    with pytest.raises(UsageError, match=r"parent b has two outputs called 'cat'") as caught:
        union_of([parent("a", ("cat",)), parent("b", ("cat", "cat"))])
    assert caught.value.key == ("parents", "b")


def test_networks_without_a_recipe_have_no_names_to_join() -> None:
    with pytest.raises(UsageError, match=r"networks bring no names: use a recipe with `labels: union`"):
        trace_networks(None, MergeSettings(heads="union"))  # type: ignore[arg-type]
