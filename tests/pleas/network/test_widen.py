"""The parents' graph with a plan's widths: batch-norm tuples, cuts through units, normalisations that cannot grow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pleas
from pleas import MergeSettings, Parents
from pleas.errors import UnsupportedModel
from pleas.layers.layer import BATCH_NORM
from pleas.network.build import draw
from pleas.network.widen import Layouts
from pleas.plan.layout import ClassPlan, everyone
from pleas.plan.plan import Plan
from tests.cases import randomise
from tests.merging import difference, evidence_of, outputs, parents, shuffled

SETTINGS = MergeSettings(ridge=1e-6, positions=64, rows=1000, propagate=0.7)


def test_a_batch_norms_tuple_is_laid_out_as_its_first_output() -> None:
    """Asked by the walk at every norm, the folded ones and those that stand alone."""
    for name in ("residual", "pre_activation", "concatenating"):
        evidence = evidence_of(name, parents(name))
        layouts = Layouts(evidence.parents.symmetry, pleas.make_plan(evidence, apart=0.5).classes, 2)
        norms = [n for n in evidence.parents.symmetry.program.graph.nodes if n.target is BATCH_NORM]
        assert norms
        for node in norms:
            found = layouts.widened(node)
            assert {dim: layout.size for dim, layout in found.items()} == {
                dim: layout.size for dim, layout in layouts.widened(node.args[0]).items()
            }
            assert set(found) <= {1}


class Strided(nn.Module):
    """Takes every second channel of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.stem(x))[:, ::2].mean((2, 3)))


class Halved(nn.Module):
    """Splits a layer's channels in two, as gates do: the halves are classes of their own, or paired units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        return self.head((a * torch.sigmoid(b)).mean((2, 3)))


class OneGroup(nn.Module):
    """A group norm over groups of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8)
        self.mix, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.mix(torch.relu(self.norm(self.stem(x))))).mean((2, 3)))


class InstanceNorms(nn.Module):
    """A norm over the positions of every channel, whose batch norm reads a reshaped batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.stem(x))).mean((2, 3)))


class FlattenedTwice(nn.Module):
    """A map flattened to features, and features back to a map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.flat = nn.Conv2d(3, 6, 3, 3), nn.Linear(6 * 4, 7 * 9)
        self.back, self.head = nn.Conv2d(7, 5, 3), nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x)).flatten(1)
        x = torch.relu(self.flat(x)).view(-1, 7, 3, 3)
        return self.head(self.back(x))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("build", [Halved, OneGroup, InstanceNorms, FlattenedTwice], ids=lambda b: b.__name__)
def test_copies_come_back_widened(build: Callable[[], nn.Module], count: int) -> None:
    a = randomise(build().eval(), torch.Generator().manual_seed(0))
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    copies = [shuffled(a, x[:2], seed) for seed in range(1, count)]
    result = pleas.merge([a, *copies], list(x.split(32)), apart=0.5, settings=SETTINGS)
    assert difference(outputs(result.module, x), outputs(a, x)) < 1e-3


def test_a_cut_that_does_not_fall_between_units_is_refused() -> None:
    """The tracer pins such units, so a plan has to ignore what it says."""
    a = randomise(Strided().eval(), torch.Generator().manual_seed(0))
    networks = Parents.of([a, a], torch.randn(2, 3, 8, 8), SETTINGS)
    symmetry = networks.symmetry
    apart = {
        c: ClassPlan.of([[1, 2] if c not in symmetry.output else [everyone(2)]] * unit_class.size, 2)
        for c, unit_class in enumerate(symmetry.classes)
    }
    sliced = [
        n
        for n in symmetry.program.graph.nodes
        if "slice" in str(n.target) and n.args[1] == 1 and len(n.args) > 4
    ]
    if not any(Layouts(symmetry, apart, 2).widened(n.args[0]) for n in sliced):
        pytest.skip("every second unit is fixed here: nothing to widen")
    with pytest.raises(
        UnsupportedModel, match=r"takes every 2th unit of a widened dimension.*Use budget 1\.0"
    ):
        draw(networks, Plan(apart, 0, 1, 1.0))
