from __future__ import annotations

from collections.abc import Callable

import pytest
import scipy.linalg
import torch

import pleas
from datafree.models import Parent
from datafree.proxy.spectra import Frame, Rank, ranks, shared_assignments
from pleas.layers import find_layers
from pleas.moments import Moments
from pleas.symmetry import UnitPermutation, identity

MakeParent = Callable[..., Parent]
SETTINGS = pleas.MergeSettings()


@pytest.fixture(scope="module")
def traced(parents: tuple[Parent, Parent]) -> pleas.Symmetry:
    return pleas.trace(parents[0].module, torch.zeros(2, 3, 16, 16))


def collected(
    symmetry: pleas.Symmetry, parents: tuple[Parent, Parent], count: int, seed: int, high: int = 256
) -> pleas.Statistics:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, high, (count, 3, 16, 16), generator=generator).byte()
    a, b = parents
    return pleas.collect(symmetry, a.module, b.module, [a.preprocess(images)], SETTINGS, images=count)


def test_the_effective_rank_counts_equal_directions(
    traced: pleas.Symmetry, parents: tuple[Parent, Parent]
) -> None:
    """k equal eigenvalues and zeros elsewhere are k effective directions, the others dead."""
    statistics = collected(traced, parents, 8, 0)
    layer = find_layers(traced.program)[-1]  # the linear head: 8 inputs
    rows = torch.zeros(1, 6, 16, dtype=torch.float64)
    for k in range(3):
        rows[0, 2 * k, k], rows[0, 2 * k + 1, k] = 1.0, -1.0
    moments = Moments.starting_at(rows)
    moments.add(rows)
    changed = pleas.Statistics({**statistics.joint, layer.name: moments}, statistics.units, images=8)
    rank_a, rank_b = ranks(traced, changed)
    assert rank_a[-1] == Rank(layer.name, 8, pytest.approx(3.0), 5)  # type: ignore[arg-type]
    assert rank_b[-1].dead == 8


def test_every_layer_has_a_rank_within_its_bounds(
    traced: pleas.Symmetry, parents: tuple[Parent, Parent]
) -> None:
    for found in ranks(traced, collected(traced, parents, 32, 0)):
        assert [rank.size for rank in found] == [27, 54, 8]
        assert all(1 <= rank.effective <= rank.size for rank in found)


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


def frame_of(
    traced: pleas.Symmetry, parents: tuple[Parent, Parent], statistics: pleas.Statistics
) -> tuple[Frame, tuple[UnitPermutation, ...]]:
    a, b = (parent.module for parent in parents)
    matching = pleas.match(traced, statistics, a, b, SETTINGS)
    return Frame(traced, statistics, matching, a, b, SETTINGS), matching


def test_proxies_that_are_the_real_images_cover_them(
    traced: pleas.Symmetry, parents: tuple[Parent, Parent]
) -> None:
    statistics = collected(traced, parents, 64, 0)
    frame, _ = frame_of(traced, parents, statistics)
    for layer in frame.cover(statistics, statistics):
        assert layer.cosine == pytest.approx(1)
        assert all(value <= 1 for value in layer.coverage)  # the ridge holds every ratio under one
        assert layer.coverage[0] <= layer.coverage[1] <= layer.coverage[2]
        assert layer.excess == pytest.approx(0, abs=1e-9)


def test_faint_proxies_leave_real_energy_uncovered(
    traced: pleas.Symmetry, parents: tuple[Parent, Parent]
) -> None:
    real, proxies = collected(traced, parents, 64, 0), collected(traced, parents, 64, 1, high=8)
    frame, _ = frame_of(traced, parents, proxies)
    covers = frame.cover(proxies, real)
    assert covers[0].coverage[2] > 10
    assert all(layer.excess is not None and layer.excess >= -1e-6 for layer in covers)
    assert covers[0].cosine < 1


def test_too_few_real_rows_are_not_compared_with(
    traced: pleas.Symmetry, parents: tuple[Parent, Parent]
) -> None:
    real, proxies = collected(traced, parents, 8, 0), collected(traced, parents, 64, 1)
    frame, _ = frame_of(traced, parents, proxies)
    covers = {layer.layer: layer.excess for layer in frame.cover(proxies, real)}
    sizes = {layer.name: layer.d_in for layer in find_layers(traced.program)}
    for name, excess in covers.items():
        assert (excess is None) == (real.joint[name].count < 2 * sizes[name])
    assert None in covers.values()


def test_coverage_is_the_generalised_eigenvalue_problem(
    traced: pleas.Symmetry, parents: tuple[Parent, Parent]
) -> None:
    real, proxies = collected(traced, parents, 64, 0), collected(traced, parents, 64, 1)
    frame, _ = frame_of(traced, parents, proxies)
    layer = find_layers(traced.program)[0]
    posed = [frame._pose(layer, one) for one in (proxies, real)]
    ridge = SETTINGS.ridge * posed[0].gram.diagonal().mean() * torch.eye(len(posed[0].gram))
    values = scipy.linalg.eigh(posed[1].gram.numpy(), (posed[0].gram + ridge).numpy(), eigvals_only=True)
    assert frame.cover(proxies, real)[0].coverage[2] == pytest.approx(values[-1])
