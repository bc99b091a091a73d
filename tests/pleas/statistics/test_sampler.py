"""Which positions are looked at: seeded, the same whatever the batches and shards."""

from __future__ import annotations

import torch

from pleas.settings import MergeSettings
from pleas.statistics.sampler import PositionSampler

FEW = MergeSettings(positions=5, seed=3)


def test_positions_are_distinct_in_order_and_differ_between_images() -> None:
    positions = PositionSampler(FEW, 6)(64, 18, 6, 6, 0)
    assert positions is not None
    assert positions.shape == (6, 5)
    assert bool((positions.diff() > 0).all())
    assert 0 <= int(positions.min()) <= int(positions.max()) < 64
    assert len({tuple(row) for row in positions.tolist()}) == 6


def test_batches_and_shards_do_not_change_the_choice() -> None:
    sampler = PositionSampler(FEW, 600)
    whole = sampler(64, 18, 600, 600, 0)
    parts = [sampler(64, 18, count, count, first) for first, count in ((0, 4), (4, 296), (300, 300))]
    assert torch.equal(torch.cat(parts), whole)  # type: ignore[arg-type]
    other = PositionSampler(MergeSettings(positions=5, seed=4), 600)(64, 18, 600, 600, 0)
    assert not torch.equal(other, whole)  # type: ignore[arg-type]


def test_a_small_map_is_taken_whole() -> None:
    assert PositionSampler(FEW, 6)(5, 18, 6, 6, 0) is None
    assert PositionSampler(MergeSettings(rows=100), 6)(64, 18, 6, 6, 0) is None


def test_enough_rows_for_the_unknowns_over_all_images() -> None:
    settings = MergeSettings(rows=16, positions=64)
    assert PositionSampler(settings, 100).limit(200) == 32  # 3,200 rows of 100 images
    assert PositionSampler(settings, 100).limit(10) == PositionSampler.LEAST
    assert PositionSampler(settings, 1).limit(200) == 64  # positions are the most
    assert PositionSampler(settings, None).limit(1) == 64  # nobody knows how many images there are


def test_windows_of_an_image_share_its_positions() -> None:
    """Four windows stand in the batch dimension: together they give about what one map would."""
    sampler = PositionSampler(MergeSettings(positions=8), 6)
    windows = sampler(16, 1000, 24, 6, 0)
    assert windows is not None
    assert windows.shape == (24, 2)
    parts = [sampler(16, 1000, 4 * count, count, first) for first, count in ((0, 2), (2, 4))]
    assert torch.equal(torch.cat(parts), windows)  # type: ignore[arg-type]
