"""Where merged units stand: of two parents [A's own | fused | B's own], of more by the mean number of the owners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch

from pleas.errors import UnsupportedModel
from pleas.plan.layout import (
    ClassPlan,
    Layout,
    everyone,
    lay_out,
    owners,
    place_of_mask,
    plain_layout,
    popcount,
)
from pleas.symmetry import DimUnits

A, B, BOTH = 1, 2, 3


def plan(size: int, apart: Sequence[int], parents: int = 2) -> ClassPlan:
    """Units of `apart` by themselves, the others fused by everybody."""
    alone = [1 << p for p in range(parents)]
    return ClassPlan.of([alone if u in apart else [everyone(parents)] for u in range(size)], parents)


def units(cls: Sequence[int], unit: Sequence[int]) -> DimUnits:
    return DimUnits(torch.tensor(cls), torch.tensor(unit))


def of_two(cls: Sequence[int], unit: Sequence[int], plans: Mapping[int, ClassPlan]) -> Layout:
    """A layout of two parents, both of which stand in one order: every merged position has one source."""
    layout = lay_out(units(cls, unit), plans, 2)
    for p in range(2):
        owned = (layout.masks >> p & 1).bool()
        assert torch.equal(layout.sources[p][owned], layout.sources.max(0).values[owned])
    return layout


def test_masks_name_owners() -> None:
    assert everyone(3) == 0b111
    assert owners(0b101) == [0, 2]
    assert popcount(torch.tensor([1, 3, 7, 4])).tolist() == [1, 2, 3, 1]
    assert sorted([1, 2, 3], key=place_of_mask) == [A, BOTH, B]
    assert sorted(range(1, 8), key=place_of_mask) == [0b001, 0b011, 0b010, 0b101, 0b111, 0b110, 0b100]


def test_one_class_is_a_only_then_fused_then_b_only() -> None:
    layout = of_two([0] * 4, [0, 1, 2, 3], {0: plan(4, [1, 3])})
    assert layout.masks.tolist() == [A, A, BOTH, BOTH, B, B]
    assert layout.sources[0].tolist() == [1, 3, 0, 2, 1, 3]


def test_flattened_map_repeats_whole_runs() -> None:
    """Channel-major flatten: a merged unit brings its whole map along, in the place that it is dealt to."""
    layout = of_two([0] * 6, [0, 0, 1, 1, 2, 2], {0: plan(3, [2])})
    assert layout.sources[0].tolist() == [4, 5, 0, 1, 2, 3, 4, 5]
    assert layout.masks.tolist() == [A] * 2 + [BOTH] * 4 + [B] * 2


def test_position_major_flatten_grows_at_every_position() -> None:
    layout = of_two([0] * 4, [0, 1, 0, 1], {0: plan(2, [1])})
    assert layout.sources[0].tolist() == [1, 0, 1, 3, 2, 3]
    assert layout.masks.tolist() == [A, BOTH, B] * 2


def test_concatenated_classes_keep_their_own_plans_and_boundaries() -> None:
    layout = of_two([0, 0, 1, 1, -1], [0, 1, 0, 1, -1], {0: plan(2, [0]), 1: plan(2, [])})
    assert layout.sources[0].tolist() == [0, 1, 0, 2, 3, 4]
    assert layout.masks.tolist() == [A, BOTH, B, BOTH, BOTH, BOTH]
    assert layout.start.tolist() == [0, 2, 3, 4, 5, 6]
    assert layout.split.tolist() == [False] * 5


def test_classes_in_turn_stay_in_turn() -> None:
    """A channel shuffle: what stands side by side keeps doing so, place by place."""
    layout = of_two([0, 1, 0, 1], [0, 0, 1, 1], {0: plan(2, [0, 1]), 1: plan(2, [])})
    assert layout.masks.tolist() == [A, A, BOTH, B, B, BOTH]
    assert layout.sources[0].tolist() == [0, 2, 1, 0, 2, 3]


def test_a_cut_through_a_unit_that_grew_is_known() -> None:
    layout = of_two([0] * 4, [0, 0, 1, 1], {0: plan(2, [0, 1])})
    assert layout.split.tolist() == [False, True, False, True]
    assert layout.start.tolist() == [0, 1, 4, 5, 8]


@pytest.mark.parametrize(
    ("partitions", "masks", "sources"),
    [
        ([[7], [1, 2, 4], [3, 4]], [1, 3, 2, 7, 4, 4], [1, 2, 1, 0, 1, 2]),
        ([[5, 2], [6, 1], [7]], [1, 2, 5, 7, 6], [1, 0, 0, 2, 1]),
    ],
)
def test_three_parents(partitions: list[list[int]], masks: list[int], sources: list[int]) -> None:
    layout = lay_out(units([0] * 3, [0, 1, 2]), {0: ClassPlan.of(partitions, 3)}, 3)
    assert layout.masks.tolist() == masks
    for p in range(3):
        owned = (layout.masks >> p & 1).bool()
        assert layout.sources[p][owned].tolist() == torch.tensor(sources)[owned].tolist()
        # Every unit of every parent stands exactly once.
        assert sorted(layout.sources[p][owned].tolist()) == [0, 1, 2]
        assert float(layout.mixing(p).sum()) <= 3
    torch.testing.assert_close(
        sum((layout.mixing(p) for p in range(3)), torch.zeros(())), torch.ones(layout.size).double()
    )


def test_who_may_read_whom() -> None:
    layout = lay_out(units([0] * 3, [0, 1, 2]), {0: ClassPlan.of([[7], [1, 2, 4], [3, 4]], 3)}, 3)
    assert layout.present() == [1, 3, 2, 7, 4]
    assert layout.positions(4).tolist() == [4, 5]
    assert layout.readable(1).tolist() == [0, 1, 3]  # its own, with B, with everybody
    assert layout.readable(7).tolist() == [0, 1, 2, 3, 4, 5]


def test_mixing_of_two() -> None:
    layout = of_two([0] * 3, [0, 1, 2], {0: plan(3, [1])})
    assert layout.mixing(0).tolist() == [1, 0.5, 0.5, 0]
    assert layout.mixing(1).tolist() == [0, 0.5, 0.5, 1]


def heads(*sizes: int) -> ClassPlan:
    masks = torch.cat([torch.full((size,), 1 << p) for p, size in enumerate(sizes)])
    sources = torch.cat([torch.arange(size) for size in sizes]).expand(len(sizes), -1)
    return ClassPlan(masks, sources, sizes[0], sizes)


def test_heads_stand_side_by_side_whatever_their_sizes() -> None:
    layout = lay_out(units([0] * 3, [0, 1, 2]), {0: heads(3, 2)}, 2)
    assert layout.masks.tolist() == [A] * 3 + [B] * 2
    assert layout.sources[0].tolist() == [0, 1, 2, 0, 1]
    layout = lay_out(units([0] * 2, [0, 1]), {0: heads(2, 3, 1)}, 3)
    assert layout.masks.tolist() == [1, 1, 2, 2, 2, 4]


def test_heads_of_several_layers_are_refused() -> None:
    with pytest.raises(
        UnsupportedModel, match="separate heads need a model whose output axis is the outputs of one"
    ):
        lay_out(units([0, 0, 1], [0, 1, 0]), {0: heads(2, 2), 1: heads(1, 1)}, 2)


def test_nothing_apart_changes_nothing() -> None:
    layout = of_two([0, 1, 0, -1], [1, 0, 0, -1], {0: plan(2, []), 1: plan(1, [])})
    assert not layout.widened
    assert layout.plain
    assert layout.sources[1].tolist() == [0, 1, 2, 3]
    assert plain_layout(4, 3).plain


def test_a_plan_knows_its_width() -> None:
    made = plan(4, [1, 3])
    assert (made.width, made.size, made.parents, made.widened) == (6, 4, 2, True)
    assert made.share_apart == 0.5
    assert plan(4, [0, 1, 2, 3], 3).share_apart == 1
    assert not plan(4, []).widened
    assert heads(3, 2).share_apart == 1
