"""The invariant everything rests on, checked on numbers: elements that agree in all labels of a value are equal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pleas.symmetry.algebra import Algebra, compact, move, reshape
from pleas.symmetry.export import export_program, state_of
from pleas.symmetry.labels import Ledger, Val, mix, positions, relate, salt_of, squash, tell_apart
from pleas.symmetry.tracking import track
from tests.cases import Case
from tests.pleas.symmetry.test_apply import ALL, values_of
from tests.pleas.symmetry.test_micro import MICRO


def cells(value: Val) -> np.ndarray:
    """One number per element; equal numbers where all labels agree."""
    total = np.zeros(value.shape, np.uint64)
    with np.errstate(over="ignore"):
        for k, label in enumerate([*value.free, *value.fixed]):
            total += mix(label.expand(value.shape).numpy().astype(np.uint64) * np.uint64(64) + np.uint64(k))
    return total


INVARIANT = ALL | {
    name: Case(MICRO[name][0], (2, 3, 6, 6))
    for name in (
        "flatten HWC",
        "halves added",
        "pixel shuffle, then mean",
        "padded channels",
        "repeated channels",
    )
}


@pytest.mark.parametrize("name", INVARIANT)
def test_elements_with_equal_labels_are_equal(name: str) -> None:
    case = INVARIANT[name]
    model = case.model().double()
    program = export_program(model, case.example().double(), rewrites=())
    tracked = track(program, model)

    values = values_of(program, state_of(program, model), case.example(3).double())
    checked = 0
    for node, numbers in values.items():
        if node.name not in tracked.values:
            continue
        label = cells(tracked.values[node.name])
        groups, where = np.unique(label, return_inverse=True)
        flat = numbers.numpy().reshape(-1).astype(float)
        spread = np.zeros(len(groups))
        first = np.zeros(len(groups))
        first[where.reshape(-1)] = flat
        np.maximum.at(spread, where.reshape(-1), np.abs(flat - first[where.reshape(-1)]))
        assert spread.max() < 1e-9 * max(1.0, np.abs(flat).max()), node.name
        checked += 1
    assert checked > 2


def line(*ids: int) -> Tensor:
    return torch.tensor(ids)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (line(0, 1, 2), line(5, 6, 7), "same"),
        (line(0, 1, 2, 3), line(5, 5, 6, 6), "a finer"),
        (line(0, 0, 1, 1), line(5, 6, 7, 8), "b finer"),
        (line(0, 0, 1, 1), line(5, 6, 5, 6), "independent"),
        (line(0, 0, 1, 1, 2, 2), line(5, 6, 5, 6, 7, 7), "mixed"),
        (line(-1, 1, 2), line(5, 6, 7), "same"),
    ],
)
def test_relations_between_labels(a: Tensor, b: Tensor, expected: str) -> None:
    ledger = Ledger()
    ledger.fresh(20, "test")
    assert relate(ledger, a, b, "test") == expected


def test_labels_on_different_dimensions_are_independent() -> None:
    ledger = Ledger()
    ledger.fresh(20, "test")
    assert relate(ledger, line(0, 1)[:, None], line(5, 6)[None], "test") == "independent"
    assert not ledger.unions
    assert not ledger.nestings


def test_positions_tell_ids_apart() -> None:
    ledger = Ledger()
    label = ledger.fresh(4, "test")
    assert not tell_apart(ledger, label, [line(0, 0, 1, 1)], 1, "because")
    assert ledger.colours[0] == ledger.colours[1] != ledger.colours[2]
    assert ledger.reason_of(np.array([3])) == "because"
    assert tell_apart(ledger, label, [torch.arange(4)], 1, "because")


def test_fixed_labels_are_kept_few() -> None:
    rows, cols = positions((4, 6))
    assert len(compact((4, 6), [rows, cols, rows * 6 + cols, rows % 2])) == 2
    window = (rows // 2) * 6 + cols
    assert len(compact((4, 6), [window, rows % 2])) == 2  # together they tell everything apart
    assert len(compact((4, 6), [rows % 2, cols % 3, cols % 2])) == 2


@pytest.mark.parametrize("shape", [(24,), (2, 12), (4, 6), (2, 3, 4, 1), (1, 8, 3), (2, 2, 6)])
def test_reshape_of_labels_is_reshape_of_tensors(shape: tuple[int, ...]) -> None:
    value = Val((2, 3, 4), [squash(torch.arange(3)[:, None].expand(2, 3, 4))], positions((2, 3, 4), [2]))
    result = reshape(value, shape)
    assert torch.equal(result.free[0].expand(shape), torch.arange(3)[:, None].expand(2, 3, 4).reshape(shape))
    moved = move(value, shape, lambda t: t.reshape(shape), range(3))
    assert torch.equal(moved.fixed[0].expand(shape), result.fixed[0].expand(shape))


def test_a_reduction_across_a_label_leaves_blocks() -> None:
    ledger = Ledger()
    label = ledger.fresh(6, "test").reshape(2, 3)
    algebra = Algebra(ledger, "sum", "")
    result = algebra.reduce(Val((2, 3), [label]), [1])
    assert result.shape == (2,)
    assert sorted(result.free[0].tolist()) == [6, 7]
    assert algebra.reduce(Val((2, 3), [label]), [0, 1]).free == []
    same = torch.stack([label[0], label[0].flip(0)])
    assert algebra.reduce(Val((2, 3), [same]), [1]).free == []  # the same ids in both rows: no block


def test_hashes_do_not_depend_on_the_process() -> None:
    assert salt_of("convolution") == 2754081679191200186
    assert int(mix(np.uint64(1))) == 0x910A2DEC89025CC1
