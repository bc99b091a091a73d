from __future__ import annotations

import torch

from pleas.layout import A_ONLY, B_ONLY, FUSED, ClassPlan, lay_out
from pleas.symmetry import DimUnits


def plan(size: int, apart: list[int]) -> ClassPlan:
    return ClassPlan(
        torch.tensor([u for u in range(size) if u not in apart]), torch.tensor(apart, dtype=torch.int64)
    )


def units(cls: list[int], unit: list[int]) -> DimUnits:
    return DimUnits(torch.tensor(cls), torch.tensor(unit))


def test_one_class_is_a_only_then_fused_then_b_only() -> None:
    layout = lay_out(units([0] * 4, [0, 1, 2, 3]), {0: plan(4, [1, 3])})
    assert layout.kind.tolist() == [A_ONLY, A_ONLY, FUSED, FUSED, B_ONLY, B_ONLY]
    assert layout.source.tolist() == [1, 3, 0, 2, 1, 3]


def test_flattened_map_repeats_whole_runs() -> None:
    """Channel-major flatten: a merged unit brings its whole map along."""
    layout = lay_out(units([0] * 6, [0, 0, 1, 1, 2, 2]), {0: plan(3, [2])})
    assert layout.source.tolist() == [4, 5, 0, 1, 2, 3, 4, 5]
    assert layout.kind.tolist() == [A_ONLY] * 2 + [FUSED] * 4 + [B_ONLY] * 2


def test_position_major_flatten_grows_at_every_position() -> None:
    layout = lay_out(units([0] * 4, [0, 1, 0, 1]), {0: plan(2, [1])})
    assert layout.source.tolist() == [1, 0, 1, 3, 2, 3]
    assert layout.kind.tolist() == [A_ONLY, FUSED, B_ONLY] * 2


def test_concatenated_classes_keep_their_own_plans_and_boundaries() -> None:
    layout = lay_out(units([0, 0, 1, 1, -1], [0, 1, 0, 1, -1]), {0: plan(2, [0]), 1: plan(2, [])})
    assert layout.source.tolist() == [0, 1, 0, 2, 3, 4]
    assert layout.kind.tolist() == [A_ONLY, FUSED, B_ONLY, FUSED, FUSED, FUSED]
    assert layout.start.tolist() == [0, 2, 3, 4, 5, 6]


def test_two_heads_stand_side_by_side_whatever_their_sizes() -> None:
    heads = ClassPlan(torch.arange(0), torch.arange(3), heads=(3, 2))
    layout = lay_out(units([0] * 3, [0, 1, 2]), {0: heads})
    assert layout.kind.tolist() == [A_ONLY] * 3 + [B_ONLY] * 2
    assert layout.source.tolist() == [0, 1, 2, 0, 1]


def test_nothing_apart_changes_nothing() -> None:
    layout = lay_out(units([0, 1, 0, -1], [1, 0, 0, -1]), {0: plan(2, []), 1: plan(1, [])})
    assert not layout.widened
    assert layout.source.tolist() == [0, 1, 2, 3]
