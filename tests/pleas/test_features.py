"""Matching inner activations: their targets on matched units, and that a run learns from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import pleas
from pleas.errors import InputError
from pleas.refine import Features, RefineSettings, refine
from pleas.symmetry import position_maps
from tests.cases import CASES
from tests.pleas.test_merge import NAMES, images, outputs, parents, permuted_copy, run

SHORT = RefineSettings(steps=80, batch=16, rate=3e-3, checks=8, holdout=0.25, feature_weight=1.0)


def features_of(result: pleas.MergeResult, a: nn.Module, b: nn.Module) -> Features:
    return Features(result.symmetry, result.matching, result.plan, a, b)


@pytest.mark.parametrize("name", NAMES)
def test_side_by_side_every_unit_is_on_its_target(name: str) -> None:
    """Nothing fused: the targets are the parents' own activations, which the merged network computes."""
    a, b = parents(name)
    result = run(name, a, b, apart=1.0)
    features, x = features_of(result, a, b), images(name, 6)
    answers, targets = features.targets([x, x])
    with torch.no_grad():
        output, found = features.run(result.module, x)
    assert torch.allclose(output, outputs(result.module, x), atol=1e-5)
    assert all(
        torch.allclose(answer, outputs(parent, x), rtol=1e-3, atol=1e-4)
        for answer, parent in zip(answers, (a, b), strict=True)
    )
    assert 1 <= len(found) == len(targets) <= 4
    assert float(features.distance(found, targets)) < 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("apart", [0.0, 0.5])
def test_a_permuted_copy_is_on_its_target_at_every_width(name: str, apart: float) -> None:
    a, b = parents(name)[0], permuted_copy(name)
    result = run(name, a, b, apart=apart)
    features, x = features_of(result, a, b), images(name, 6)
    _, targets = features.targets([x, x])
    with torch.no_grad():
        _, found = features.run(result.module, x)
    assert float(features.distance(found, targets)) < 1e-5


def test_a_fused_unit_should_be_the_mean_of_its_two() -> None:
    """Against the parents' own modules and the matching, without the graph."""
    a, b = parents("plain")
    result = run("plain", a, b, apart=0.0)
    features, x = features_of(result, a, b), images("plain", 6)
    layer = features.stages[0].layer
    seen: list[Tensor] = []
    for parent in (a, b):
        handle = parent.get_submodule(layer.name).register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0])
        )
        outputs(parent, x)
        handle.remove()
    own = position_maps(result.symmetry, result.matching)[layer.weight, 1]
    assert torch.allclose(features.targets([x, x])[1][0], (seen[0] + seen[1][:, own]) / 2, atol=1e-5)


def test_a_run_comes_closer_to_the_matched_activations() -> None:
    a, b = parents("residual")
    result = run("residual", a, b, apart=0.25)
    shape = CASES["residual"].shape[1:]
    pixels = torch.randint(0, 256, (96, *shape), generator=torch.Generator().manual_seed(2)).to(torch.uint8)

    def normalise(images: Tensor) -> Tensor:
        return images.float() / 64 - 2

    def distance(module: nn.Module) -> float:
        features, x = features_of(result, a, b), normalise(pixels)
        with torch.no_grad():
            return float(features.distance(features.run(module, x)[1], features.targets([x, x])[1]))

    tried = {
        weight: refine(
            result.module,
            a,
            b,
            pixels,
            replace(SHORT, feature_weight=weight),
            normalise=normalise,
            features=features_of(result, a, b),
        )
        for weight in (0.0, 1.0)
    }
    assert all(one.kept == "refined" for one in tried.values())
    assert distance(tried[1.0].module) < distance(tried[0.0].module)
    with pytest.raises(InputError, match="which units are matched: give `features`"):
        refine(result.module, a, b, pixels, SHORT, normalise=normalise)
