"""FLOPs from widths alone: those that FlopCounterMode counts on the module that is built."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from pleas import Parents, Plan
from pleas.assemble import check_widening
from pleas.network.build import build, draw
from pleas.network.module import flops
from pleas.plan.cost import FlopModel
from pleas.plan.layout import ClassPlan, everyone
from pleas.solve.propagate import averaged_state
from tests.cases import CASES
from tests.merging import NAMES, evidence_of, parents, traced


def random_partition(parents: int, generator: torch.Generator) -> list[int]:
    """The owners in parts, any way."""
    part = torch.randint(parents, (parents,), generator=generator).tolist()
    return [sum(1 << p for p in range(parents) if part[p] == k) for k in sorted(set(part))]


def random_plan(networks: Parents, seed: int) -> Plan:
    """Every unit of every class that may be widened in parts of its own."""
    generator, symmetry = torch.Generator().manual_seed(seed), networks.symmetry
    made = {}
    for c, unit_class in enumerate(symmetry.classes):
        free = unit_class.widenable and c not in symmetry.output
        whole = [everyone(networks.count)]
        partitions = [
            random_partition(networks.count, generator) if free else whole for _ in range(unit_class.size)
        ]
        made[c] = ClassPlan.of(partitions, networks.count)
    model = FlopModel(symmetry, networks.count)
    return Plan(made, model.total(masks_of(made)), model.parent, 0.5)


def masks_of(plans: dict[int, ClassPlan]) -> dict[int, Counter[int]]:
    return {c: Counter(plan.masks.tolist()) for c, plan in plans.items()}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_any_plan_costs_what_the_built_module_takes(name: str, count: int) -> None:
    """Also plans that no order of splits gives; and the widened graph computes what the parents do."""
    evidence = evidence_of(name, parents(name, count))
    plan = random_plan(evidence.parents, seed=count)
    drawing = draw(evidence.parents, plan)
    module = build(evidence.parents, plan, drawing, averaged_state(evidence, drawing))
    assert flops(module, evidence.parents.example) == plan.flops
    check_widening(evidence.parents, plan, drawing)


@pytest.mark.parametrize("name", NAMES)
def test_a_parent_costs_what_its_module_takes(name: str) -> None:
    model = FlopModel(traced(name), 2)
    assert model.parent == flops(parents(name)[0], CASES[name].example())
    if not traced(name).program.added:
        assert model.total({}) == model.parent


def test_part_of_the_layers_is_priced_alone() -> None:
    """What a class's split adds is read from the layers that touch it: the differences are those of the whole."""
    symmetry = traced("residual")
    model = FlopModel(symmetry, 3)
    for c, unit_class in enumerate(symmetry.classes):
        if c in symmetry.output or not unit_class.widenable:
            continue
        widened = {c: {7: unit_class.size - 1, 1: 1, 6: 1}}
        whole, part = (model.total(widened, only) - model.total({}, only) for only in (None, [c]))
        assert whole == part > 0


def test_heads_count_as_they_are() -> None:
    symmetry = traced("residual")
    heads = ClassPlan(
        torch.tensor([1] * 5 + [2] * 3), torch.tensor([*range(5), *range(3)]).expand(2, -1), 5, (5, 3)
    )
    extra = FlopModel(symmetry, 2, heads).total({}) - FlopModel(symmetry, 2).total({})
    assert extra == 2 * 3 * 8  # three more outputs of eight inputs


def test_depth_follows_the_graph() -> None:
    symmetry = traced("residual")
    model = FlopModel(symmetry, 2)
    first = int(symmetry.axis("0.0.weight", 0).cls[0])
    assert model.depth(first) == 0
    assert all(model.depth(c) >= 0 for c in range(len(symmetry.classes)))
