"""Matching inner activations: their targets on matched units, and that a run learns from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import pleas
from pleas import Evidence, MergeResult, MergeSettings, Plan
from pleas.errors import InputError
from pleas.refine import Features, RefineSettings, Teacher, refine
from pleas.symmetry import position_maps
from tests.cases import CASES
from tests.merging import NAMES, evidence_of, images, outputs, parents, permuted_copy

SHORT = RefineSettings(steps=80, batch=16, rate=3e-3, checks=8, holdout=0.25, feature_weight=1.0)
SETTINGS = MergeSettings(ridge=1e-6, head_ridge=1e-6, positions=256, rows=1000, propagate=0.7)


def merged(name: str, modules: Sequence[nn.Module], apart: float) -> tuple[MergeResult, Evidence, Plan]:
    evidence = evidence_of(name, tuple(modules), SETTINGS)
    plan = pleas.make_plan(evidence, apart=apart)
    return pleas.assemble(evidence, plan), evidence, plan


@pytest.mark.parametrize("name", ["concatenating", "grouped", "residual"])
def test_side_by_side_every_unit_is_on_its_target(name: str) -> None:
    """Nothing fused: the targets are the parents' own activations, which the merged network computes."""
    pair = parents(name)
    result, evidence, plan = merged(name, pair, apart=1.0)
    features, x = Features(evidence, plan), images(name, 6)
    answers, targets = features.targets([x, x])
    with torch.no_grad():
        output, found = features.run(result.module, x)
    assert torch.allclose(output, outputs(result.module, x), atol=1e-5)
    assert all(
        torch.allclose(answer, outputs(parent, x), rtol=1e-3, atol=1e-4)
        for answer, parent in zip(answers, pair, strict=True)
    )
    assert 1 <= len(found) == len(targets) <= 4
    assert float(features.distance(found, targets)) < 1e-6


@pytest.mark.parametrize(
    ("name", "apart"), [*((name, 0.5) for name in NAMES), ("plain", 0.0), ("residual", 0.0)]
)
def test_a_permuted_copy_is_on_its_target_at_every_width(name: str, apart: float) -> None:
    result, evidence, plan = merged(name, [parents(name)[0], permuted_copy(name)], apart)
    features, x = Features(evidence, plan), images(name, 6)
    _, targets = features.targets([x, x])
    with torch.no_grad():
        _, found = features.run(result.module, x)
    assert float(features.distance(found, targets)) < 1e-5


@pytest.mark.parametrize("apart", [0.0, 0.5])
def test_a_units_target_is_the_mean_over_its_owners(apart: float) -> None:
    """Three parents, unit by unit, against their own modules and the matching, without the graph."""
    three = parents("plain", 3)
    _, evidence, plan = merged("plain", three, apart)
    features, x = Features(evidence, plan), images("plain", 6)
    layer, units = features.stages[0].layer, features.stages[0].units
    seen: list[Tensor] = []
    for parent, alignment in zip(three, evidence.alignments, strict=True):
        handle = parent.get_submodule(layer.name).register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0])
        )
        outputs(parent, x)
        handle.remove()
        own = position_maps(evidence.parents.symmetry, alignment).get((layer.weight, 1))
        seen[-1] = seen[-1] if own is None else seen[-1][:, own]
    target = features.targets([x, x, x])[1][0]
    assert target.shape[1] == units.size
    for place, mask in enumerate(units.masks.tolist()):
        mine = [seen[p][:, units.sources[p, place]] for p in range(3) if mask >> p & 1]
        assert torch.allclose(target[:, place], torch.stack(mine).mean(0), atol=1e-5)


def test_a_run_comes_closer_to_the_matched_activations() -> None:
    pair = parents("residual")
    result, evidence, plan = merged("residual", pair, apart=0.25)
    teachers = [Teacher(name, module) for name, module in zip("ab", pair, strict=True)]
    shape = CASES["residual"].shape[1:]
    pixels = torch.randint(0, 256, (128, *shape), generator=torch.Generator().manual_seed(2)).to(torch.uint8)

    def normalise(images: Tensor) -> Tensor:
        return images.float() / 64 - 2

    def distance(module: nn.Module) -> float:
        features, x = Features(evidence, plan), normalise(pixels)
        with torch.no_grad():
            return float(features.distance(features.run(module, x)[1], features.targets([x, x])[1]))

    tried = {
        weight: refine(
            result.module,
            teachers,
            pixels,
            replace(SHORT, feature_weight=weight),
            normalise=normalise,
            features=Features(evidence, plan),
            snapshots=1,
        ).snapshots[0]
        for weight in (0.0, 1.0)
    }
    assert tried[1.0].step == 80
    assert distance(tried[1.0].module) < distance(tried[0.0].module)
    with pytest.raises(InputError, match="which units are matched: give `features`"):
        refine(result.module, teachers, pixels, SHORT, normalise=normalise)
