"""The largest budget that can be reached is what a merge of everything apart has, and what holds the rest is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pleas
from pleas.plan.reach import Held, Reach, reach, say_reach
from pleas.settings import MergeSettings
from tests.cases import CASES, conv_bn, pooled_head, randomise

EXAMPLE = torch.zeros(2, 3, 8, 8)


class Competing(nn.Module):
    """The channels of the middle compete: a softmax runs over them, so that strangers would change each other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.head = conv_bn(3, 6), conv_bn(6, 8), pooled_head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x)).softmax(1))


def _parents(build: type[nn.Module], count: int = 2, heads: str = "shared") -> pleas.Parents:
    modules = [randomise(build().eval(), torch.Generator().manual_seed(seed)) for seed in range(count)]
    return pleas.Parents.of(modules, EXAMPLE, MergeSettings(heads=heads))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [2, 3])
def test_everything_apart_costs_what_reach_says(count: int) -> None:
    parents = _parents(Competing, count)
    images = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    evidence = pleas.gather(parents, list(images.split(8)))
    found = reach(parents)
    result = pleas.assemble(evidence, pleas.make_plan(evidence, budget=float(count)), least_squares=False)
    assert result.ratio == pytest.approx(found.ratio)
    assert 1 < found.ratio < count
    (said,) = say_reach(found, [float(count)])
    assert said in result.notes
    assert "is not the parents' ensemble. Held together: " in said
    assert "middle.0.weight[out] - middle.1.* - head.2.weight[in] (a softmax runs over it)" in said


def test_what_can_be_kept_apart_throughout_reaches_every_budget() -> None:
    case = CASES["residual"]
    parents = pleas.Parents.of([case.model(0), case.model(1)], case.example())
    found = reach(parents)
    assert (found.ratio, found.held) == (pytest.approx(2.0), ())
    assert say_reach(found, [1.0, 1.5, 2.0]) == ()


def test_what_is_said() -> None:
    held = (Held("a - b - c - d", 4, "why", 0.5), Held("e", 2, "why", 0.4), Held("f", 2, "", 0.1))
    assert say_reach(Reach(2, 1.31, held), [1.0, 1.25, 1.5, 2.0]) == (
        "budget 1.5 and 2 cannot be reached: 1.310 of one parent is the most there is, and that is not the parents' "
        "ensemble. Held together: a - b - c - 1 more and 1 more (why); f (its units cannot be exchanged)",
    )
    assert say_reach(Reach(2, 1.0, ()), [1.5]) == (
        "budget 1.5 cannot be reached: 1.000 of one parent is the most there is, because no class of units can be kept "
        "apart",
    )
    assert say_reach(Reach(2, 1.998, held[2:]), [1.5]) == ()
    assert say_reach(Reach(2, 1.998, held[2:]), [1.5, 2.0]) == (
        "budget 2, everything apart that can be, is not the parents' ensemble. Held together: f (its units cannot be "
        "exchanged)",
    )
