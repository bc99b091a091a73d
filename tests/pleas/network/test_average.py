"""Tensors that no least squares covers, entry by entry."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import pleas
from pleas.network.average import average, contracted, mean_of_owners
from pleas.network.build import draw
from pleas.plan.layout import ClassPlan, Layout, everyone, lay_out
from pleas.solve.propagate import averaged_state
from pleas.symmetry import DimUnits
from tests.cases import randomise
from tests.merging import evidence_of, parents


def axis(partitions: list[list[int]], count: int) -> Layout:
    size = len(partitions)
    units = DimUnits(torch.zeros(size, dtype=torch.int64), torch.arange(size))
    return lay_out(units, {0: ClassPlan.of(partitions, count)}, count)


def by_entry(values: list[Tensor], layouts: dict[int, Layout]) -> Tensor:
    """The mean over the parents that own an entry along every axis, 0 where nobody does."""
    sizes = [layouts[d].size if d in layouts else n for d, n in enumerate(values[0].shape)]
    out = torch.zeros(sizes, dtype=values[0].dtype)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in sizes)).view(-1, len(sizes)).tolist():
        owned = [
            value[tuple(int(layouts[d].sources[p, i]) if d in layouts else i for d, i in enumerate(place))]
            for p, value in enumerate(values)
            if all(int(layouts[d].masks[i]) >> p & 1 for d, i in enumerate(place) if d in layouts)
        ]
        if owned:
            out[tuple(place)] = sum(owned) / len(owned)
    return out


TWO = axis([[3], [1, 2], [3]], 2)
THREE = axis([[7], [3, 4], [1, 2, 4]], 3)


@pytest.mark.parametrize("dims", [(), (0,), (1,), (0, 1), (2,)])
@pytest.mark.parametrize(("count", "layout"), [(2, TWO), (3, THREE)])
def test_an_entry_is_the_mean_over_its_owners(count: int, layout: Layout, dims: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = [torch.randn(3, 3, 3) for _ in range(count)]
    layouts = dict.fromkeys(dims, layout)
    torch.testing.assert_close(mean_of_owners(values, layouts), by_entry(values, layouts))


def test_values_of_everybodys_own_stay_as_they_are() -> None:
    x = torch.randn(4, 5)
    assert torch.equal(mean_of_owners([x, x], {}), x)
    assert mean_of_owners([x.bfloat16()] * 3, {}).dtype == torch.bfloat16


def test_heads_of_other_sizes_are_read_within_their_bounds() -> None:
    heads = ClassPlan(torch.tensor([1, 1, 1, 2, 2]), torch.tensor([0, 1, 2, 0, 1]).expand(2, -1), 3, (3, 2))
    layout = lay_out(DimUnits(torch.zeros(3).long(), torch.arange(3)), {0: heads}, 2)
    values = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0])]
    assert mean_of_owners(values, {0: layout}).tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("count", [2, 3])
def test_a_merged_network_starts_from_the_owners_mean(count: int) -> None:
    """Weights read units: a fused unit's weight on a unit that only one parent keeps counts one over its owners.
    Biases, scales and statistics belong to units."""
    evidence = evidence_of("residual", parents("residual", count))
    drawing = draw(evidence.parents, pleas.make_plan(evidence, apart=0.5))
    symmetry, layouts = evidence.parents.symmetry, drawing.layouts
    found = averaged_state(evidence, drawing)
    assert found.keys() == {*symmetry.program.parameters, *symmetry.program.buffers, *symmetry.program.added}
    for name in ("1.reduce.1.weight", "1.reduce.1.running_var"):
        own = [state[name] for state in evidence.states]
        torch.testing.assert_close(found[name], by_entry(own, {0: layouts.axis(name, 0)}))
    name = "1.spatial.0.weight"
    rows, columns = layouts.axis(name, 0), layouts.axis(name, 1)
    assert found[name].shape[:2] == (rows.size, columns.size)
    for i in range(rows.size):
        held = [p for p in range(count) if int(rows.masks[i]) >> p & 1]
        for j in range(columns.size):
            expected = sum(
                evidence.states[p][name][rows.sources[p, i], columns.sources[p, j]]
                * (int(columns.masks[j]) >> p & 1)
                for p in held
            ) / len(held)
            torch.testing.assert_close(found[name][i, j], expected)


def test_integers_and_plain_tensors_are_kept() -> None:
    evidence = evidence_of("residual", parents("residual"))
    drawing = draw(evidence.parents, pleas.make_plan(evidence, budget=1.0))
    state = {"x": torch.tensor([3, 4])}
    kept = average("x", [state, state], evidence.parents.symmetry, drawing.layouts, frozenset())
    assert kept.tolist() == [3, 4]
    assert kept is not state["x"]
    assert everyone(2) == 3


def test_weights_are_what_reaches_a_product() -> None:
    vit = timm.models.VisionTransformer(
        img_size=16, patch_size=4, num_classes=5, embed_dim=24, depth=1, num_heads=3
    )
    vit = randomise(vit.eval(), torch.Generator().manual_seed(0))
    found = contracted(pleas.trace(vit, torch.randn(2, 3, 16, 16)).program)
    linear = {f"{name}.weight" for name, m in vit.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert linear <= found
    assert not {"pos_embed", "norm.weight", "head.bias"} & found
