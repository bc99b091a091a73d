"""Arithmetic of task vectors, by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import pleas
from pleas import InputError, Parents
from pleas.comparators.comparator import Case
from pleas.comparators.task_vectors import (
    Dare,
    Lines,
    Slerp,
    TaskArithmetic,
    breadcrumbs,
    dare,
    lines,
    slerp,
    ties,
)
from pleas.comparators.vectors import FromBase, depths, largest

X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [1.0, 3.0]])


def vector(*values: float) -> dict[str, Tensor]:
    return {"w": torch.tensor(values, dtype=torch.float64)}


def close(found: Mapping[str, Tensor], *values: float) -> None:
    torch.testing.assert_close(found["w"].flatten(), torch.tensor(values, dtype=torch.float64))


def network(weight: list[list[float]], mean: float, outputs: int = 2, head: float = 1.0) -> nn.Module:
    """A linear map of two units, a batch norm, and a head."""
    made = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2), nn.Linear(2, outputs, bias=False))
    made[0].weight.data, made[2].weight.data = torch.tensor(weight), torch.full((outputs, 2), head)
    made[1].running_mean, made[1].num_batches_tracked = torch.tensor([mean, 0.0]), torch.tensor(int(mean))
    return made.eval()


def merged(method: FromBase | Slerp, *modules: nn.Module, base: nn.Module | None) -> dict[str, Tensor]:
    parents = Parents.of(modules, X[:2], pleas.MergeSettings(min_rows=0.0), base=base)
    evidence = pleas.gather(parents, [X])
    found = method(Case(evidence, evidence.inputs, base=parents.base_state))
    assert isinstance(found, nn.Module)
    return dict(found.state_dict())


def test_task_vectors_are_added_to_the_base_and_statistics_averaged() -> None:
    base = network([[1.0, 0.0], [0.0, 1.0]], 7)
    a, b = network([[3.0, 0.0], [0.0, 1.0]], 2, head=3.0), network([[1.0, 4.0], [0.0, 0.0]], 4)
    found = merged(TaskArithmetic(scale=0.5, repair="none"), a, b, base=base)
    torch.testing.assert_close(found["0.weight"], torch.tensor([[2.0, 2.0], [0.0, 0.5]]))
    torch.testing.assert_close(found["2.weight"], torch.full((2, 2), 2.0))
    torch.testing.assert_close(found["1.running_mean"], torch.tensor([3.0, 0.0]))  # the mean of 2 and 4


def test_a_head_that_the_base_has_not_is_averaged() -> None:
    base = network([[1.0, 0.0], [0.0, 1.0]], 0, outputs=5)
    a, b = network([[3.0, 0.0], [0.0, 1.0]], 0, head=3.0), network([[1.0, 4.0], [0.0, 0.0]], 0)
    found = merged(TaskArithmetic(repair="none"), a, b, base=base)
    torch.testing.assert_close(found["0.weight"], torch.tensor([[1.6, 1.2], [0.0, 0.7]]))
    torch.testing.assert_close(found["2.weight"], torch.full((2, 2), 2.0))


def test_what_has_no_base_is_refused() -> None:
    a, b = network([[3.0, 0.0], [0.0, 1.0]], 0), network([[1.0, 4.0], [0.0, 0.0]], 0)
    with pytest.raises(InputError, match="need the network that all parents were fine-tuned from"):
        merged(TaskArithmetic(), a, b, base=None)


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"drop = 1\.5: must lie between 0 and 0\.999"):
        Dare(drop=1.5)
    with pytest.raises(InputError, match=r"first = -1: must lie between 0 and 10"):
        Lines(first=-1)


def test_ties_trims_elects_and_averages() -> None:
    """Kept of the first are 4, 2, -3, of the second 1, 5, -2.5, -1 (equals stay together); signs + + - 0 -."""
    given = [vector(4, -1, 2, 0.5, -3), vector(1, 5, -2.5, 0.2, -1)]
    close(ties(given, 0.4, 1.0), 2.5, 5, -2.5, 0, -2)
    close(ties(given, 0.4, 0.5), 1.25, 2.5, -1.25, 0, -1)


def test_an_undecided_sign_goes_with_the_others() -> None:
    close(ties([vector(1, 3), vector(-1, 3)], 1.0, 1.0), 1, 3)
    close(ties([vector(1, -3), vector(-1, -3)], 1.0, 1.0), -1, -3)


def test_ties_trims_over_all_tensors_of_a_task_vector() -> None:
    given = [{"w": torch.tensor([[9.0, 8.0]]), "v": torch.tensor([1.0, 2.0])}] * 2
    found = ties(given, 0.25, 1.0)
    assert found["w"].tolist() == [[9.0, 8.0]]
    assert found["v"].tolist() == [0.0, 0.0]


def test_the_largest_entries_include_the_one_at_the_border() -> None:
    rows = torch.tensor([[1.0, -4.0, 3.0, 2.0], [1.0, 1.0, 1.0, 0.0]])
    assert largest(rows, 0.5).int().tolist() == [[0, 1, 1, 1], [1, 1, 1, 0]]
    assert largest(rows, 0.0).int().tolist() == [[0, 1, 0, 0], [1, 1, 1, 0]]
    assert bool(largest(rows, 1.0).all())


def test_dare_drops_and_enlarges_by_a_seeded_draw() -> None:
    given = [vector(*range(1, 9)), vector(*range(8))]
    close(dare(given, 0.0, 1.0, 0), *(2 * i + 1.0 for i in range(8)))
    found = dare(given, 0.75, 0.5, 3)["w"]
    generator = torch.Generator().manual_seed(3)
    kept = [torch.rand(8, generator=generator) >= 0.75 for _ in given]
    expected = 0.5 * 4 * (given[0]["w"] * kept[0] + given[1]["w"] * kept[1])
    torch.testing.assert_close(found, expected)
    assert torch.equal(found, dare(given, 0.75, 0.5, 3)["w"])
    assert not torch.equal(found, dare(given, 0.75, 0.5, 4)["w"])
    many = dare([{"w": torch.ones(20_000)}], 0.9, 1.0, 0)["w"]
    assert float(many.mean()) == pytest.approx(1.0, abs=0.1)  # as large as before in the mean


def test_breadcrumbs_leave_out_the_smallest_and_the_largest() -> None:
    first = vector(10, -1, 2, -3, 4, -5, 6, -7, 8, -9)
    close(breadcrumbs([first], 0.3, 0.9, 0.5), 0, 0, 0, 0, 2, -2.5, 3, -3.5, 4, -4.5)
    both = breadcrumbs([first, vector(*[1.0] * 10)], 0.0, 1.0, 1.0)
    close(both, 11, 0, 3, -2, 5, -4, 7, -6, 9, -8)


def test_lines_grow_with_depth() -> None:
    names = ["a.weight", "a.bias", "b.weight", "c.weight"]
    depth = depths(names)
    assert depth == {"a.weight": 0.0, "a.bias": 0.0, "b.weight": 0.5, "c.weight": 1.0}
    vectors = [{name: torch.ones(1) for name in names} for _ in range(2)]
    found = lines(vectors, depth, 0.5, 0.2)
    assert [round(float(found[name]), 6) for name in names] == [1.0, 1.0, 1.2, 1.4]


def test_the_first_layer_of_lines_is_scaled_by_the_number_of_parents() -> None:
    base = network([[1.0, 0.0], [0.0, 1.0]], 0)
    a, b = network([[3.0, 0.0], [0.0, 1.0]], 0, head=3.0), network([[1.0, 4.0], [0.0, 0.0]], 0)
    found = merged(Lines(repair="none"), a, b, base=base)
    torch.testing.assert_close(found["0.weight"], torch.tensor([[2.0, 2.0], [0.0, 0.5]]))
    torch.testing.assert_close(found["2.weight"], torch.full((2, 2), 3.0))


def test_slerp_stays_on_the_great_circle() -> None:
    x, y = torch.tensor([2.0, 0.0]).double(), torch.tensor([0.0, 2.0]).double()
    torch.testing.assert_close(slerp(x, y, 0.5).tolist(), [math.sqrt(2), math.sqrt(2)])
    torch.testing.assert_close(
        slerp(x, y, 1 / 3).tolist(), [2 * math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)]
    )
    assert slerp(x, 3 * x, 0.5).tolist() == [4.0, 0.0]  # parallel
    assert slerp(x, 0 * x, 0.5).tolist() == [1.0, 0.0]


def test_slerp_needs_no_base() -> None:
    a, b = network([[2.0, 0.0], [0.0, 0.0]], 0), network([[0.0, 2.0], [0.0, 0.0]], 0)
    found = merged(Slerp(repair="none"), a, b, base=None)
    torch.testing.assert_close(found["0.weight"], torch.tensor([[math.sqrt(2), math.sqrt(2)], [0.0, 0.0]]))
    assert Slerp.most_parents == 2
