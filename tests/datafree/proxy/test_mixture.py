from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datafree.errors import UsageError
from datafree.proxy.mixture import interleave


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 200))
def test_every_prefix_is_a_fair_mixture(weights: list[int], count: int) -> None:
    shares = [weight / sum(weights) for weight in weights]
    order = interleave(shares, count)
    for n in range(count + 1):
        for source, weight in enumerate(weights):
            exact = Fraction(weight, sum(weights)) * n
            assert abs(int((order[:n] == source).sum()) - exact) < 1


def test_shares_that_come_out_whole_are_exact() -> None:
    order = interleave([0.5, 0.3, 0.2], 1000)
    assert np.bincount(order).tolist() == [500, 300, 200]
    assert np.bincount(order[:10]).tolist() == [5, 3, 2]


def test_a_longer_set_starts_with_the_shorter_one() -> None:
    assert np.array_equal(interleave([0.7, 0.3], 1000)[:64], interleave([0.7, 0.3], 64))


def test_rounded_thirds_are_thirds() -> None:
    assert np.bincount(interleave([0.3333, 0.3333, 0.3334], 300)).tolist() == [100, 100, 100]


def test_shares_that_do_not_add_up() -> None:
    with pytest.raises(UsageError) as error:
        interleave([0.5, 0.6], 10)
    assert str(error.value) == (
        "the shares under proxy.sources (0.5, 0.6) add up to 1.1: make them add up to 1"
    )
