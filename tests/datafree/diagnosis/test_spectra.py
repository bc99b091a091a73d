"""Ranks of what proxies excite, and how far two matchings agree, against counts done by hand."""

from __future__ import annotations

import pytest
import torch

import pleas
from datafree.diagnosis.spectra import Rank, ranks, shared_assignments
from datafree.models.parent import Parent
from pleas.statistics.moments import Moments
from pleas.symmetry import UnitPermutation, identity
from tests.datafree.conftest import make_parent


@pytest.fixture(scope="module")
def three() -> tuple[Parent, ...]:
    return make_parent("a", 1), make_parent("b", 2), make_parent("c", 3)


@pytest.fixture(scope="module")
def networks(three: tuple[Parent, ...]) -> pleas.Parents:
    return pleas.Parents.of([parent.module for parent in three], torch.zeros(2, 3, 16, 16))


@pytest.fixture(scope="module")
def traced(networks: pleas.Parents) -> pleas.Symmetry:
    return networks.symmetry


def collected(networks: pleas.Parents, three: tuple[Parent, ...], count: int) -> pleas.Statistics:
    pixels = torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    return pleas.collect(networks, [three[0].preprocess(pixels)], images=count)


def test_the_effective_rank_counts_equal_directions(
    networks: pleas.Parents, three: tuple[Parent, ...]
) -> None:
    """k equal eigenvalues and zeros elsewhere are k effective directions, the others dead."""
    statistics = collected(networks, three, 8)
    layer = networks.layers[-1]  # the linear head: 8 inputs of each parent
    rows = torch.zeros(1, 6, 24, dtype=torch.float64)
    for k in range(3):
        rows[0, 2 * k, 8 + k], rows[0, 2 * k + 1, 8 + k] = 1.0, -1.0  # of the second parent
    moments = Moments.starting_at(rows)
    moments.add(rows)
    changed = pleas.Statistics({**statistics.units, (layer.weight, 1): moments}, images=8)
    a, b, c = ranks(networks, changed)
    assert b[-1] == Rank(layer.name, 8, pytest.approx(3.0), 5)  # type: ignore[arg-type]
    assert a[-1].dead == c[-1].dead == 8


def test_every_layer_has_a_rank_within_its_bounds(networks: pleas.Parents, three: tuple[Parent, ...]) -> None:
    found = ranks(networks, collected(networks, three, 32))
    assert len(found) == 3
    for of_parent in found:
        assert [(rank.layer, rank.size) for rank in of_parent] == [("0", 3), ("3", 6), ("8", 8)]
        assert all(1 <= rank.effective <= rank.size for rank in of_parent)


def test_every_parent_is_ranked_by_its_own_units(networks: pleas.Parents, three: tuple[Parent, ...]) -> None:
    """As the parents alone would be, one at a time, in float64."""
    pixels = torch.randint(0, 256, (32, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    found = ranks(networks, collected(networks, three, 32))
    for parent, of_parent in zip(three, found, strict=True):
        with torch.no_grad():
            pooled = parent.module[:8](parent.preprocess(pixels)).double()  # type: ignore[index]
        centred = pooled - pooled.mean(0)
        values = torch.linalg.eigvalsh(centred.T @ centred)
        shares = values / values.sum()
        assert of_parent[-1].effective == pytest.approx(float((-(shares * shares.log()).sum()).exp()))


def test_shared_assignments_count_units(traced: pleas.Symmetry) -> None:
    one = identity(traced)
    assert shared_assignments(traced, one, one) == 1.0
    index = next(number for number in range(len(one)) if number not in traced.output)
    turned = UnitPermutation(one[index].perm.roll(1), one[index].children)
    other = (*one[:index], turned, *one[index + 1 :])
    units = sum(len(each.perm) for number, each in enumerate(one) if number not in traced.output)
    assert shared_assignments(traced, one, other) == pytest.approx(1 - len(turned.perm) / units)


def test_units_inside_count_only_where_their_unit_is_matched_alike(traced: pleas.Symmetry) -> None:
    def heads(order: list[int], inner: list[list[int]]) -> UnitPermutation:
        children = tuple((UnitPermutation(torch.tensor(each), ()),) for each in inner)
        return UnitPermutation(torch.tensor(order), children)

    nothing = pleas.Symmetry.__new__(pleas.Symmetry)
    object.__setattr__(nothing, "output", ())
    one = heads([0, 1], [[0, 1, 2], [0, 1, 2]])
    assert shared_assignments(nothing, (one,), (heads([0, 1], [[0, 2, 1], [0, 1, 2]]),)) == pytest.approx(
        4 / 6
    )
    assert shared_assignments(nothing, (one,), (heads([1, 0], [[0, 1, 2], [0, 1, 2]]),)) == 0.0
