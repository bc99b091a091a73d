"""Scales and shifts of layer norms, against an explicit regression on explicit rows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pleas
from pleas import MergeSettings
from pleas.layer_norm import find_layer_norms, fit_layer_norm
from pleas.moments import Moments
from tests.cases import randomise
from tests.pleas.test_transformers import outputs, vit

SETTINGS = MergeSettings(ridge=1e-6, positions=256, rows=1000)


def parents() -> tuple[nn.Module, nn.Module, list[Tensor]]:
    built = [randomise(vit().eval(), torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    return built[0], built[1], list(images.split(32))


def matched() -> tuple[pleas.Symmetry, pleas.Statistics, pleas.Permutation]:
    """The symmetry, the first pass and the matching of these parents."""
    a, b, batches = parents()
    symmetry = pleas.trace(a, batches[0][:2])
    first = pleas.collect(symmetry, a, b, batches, SETTINGS)
    return symmetry, first, pleas.match(symmetry, first, a, b, SETTINGS)


def test_every_layer_norm_of_a_transformer_is_found() -> None:
    a, _, batches = parents()
    found = find_layer_norms(pleas.trace(a, batches[0][:2]).program)
    assert {norm.weight.removesuffix(".weight") for norm in found} == {
        name for name, module in a.named_modules() if isinstance(module, nn.LayerNorm)
    }


def test_the_closed_form_is_the_regression_of_each_unit() -> None:
    a, _, batches = parents()
    norm = find_layer_norms(pleas.trace(a, batches[0][:2]).program)[0]
    generator = torch.Generator().manual_seed(3)
    x = [torch.randn(200, 24, generator=generator, dtype=torch.float64) * scale for scale in (1.0, 3.0)]
    states = [
        {name: torch.randn(24, generator=generator, dtype=torch.float64) for name in (norm.weight, norm.bias)}
        for _ in x
    ]
    rows = norm.rows(x, states)
    moments = Moments.starting_at(rows)
    moments.add(rows)
    fitted = fit_layer_norm(norm, moments, (states[0], states[1]), share=1.0, ridge=1e-12)
    plain = F.layer_norm((x[0] + x[1]) / 2, (24,), eps=norm.eps)
    wanted = sum(
        F.layer_norm(v, (24,), s[norm.weight], s[norm.bias], norm.eps) for v, s in zip(x, states, strict=True)
    )
    for unit in range(24):
        columns = torch.stack([plain[:, unit], torch.ones(200, dtype=torch.float64)], 1)
        scale, shift = torch.linalg.lstsq(columns, wanted[:, unit, None] / 2).solution[:, 0]  # type: ignore[index]
        assert float(fitted[norm.weight][unit]) == pytest.approx(float(scale), rel=1e-6)
        assert float(fitted[norm.bias][unit]) == pytest.approx(float(shift), rel=1e-6, abs=1e-9)
    half = fit_layer_norm(norm, moments, (states[0], states[1]), share=0.5, ridge=1e-12)
    none = fit_layer_norm(norm, moments, (states[0], states[1]), share=0.0, ridge=1e-12)
    for name in (norm.weight, norm.bias):
        assert torch.equal(none[name], (states[0][name] + states[1][name]) / 2)
        assert torch.allclose(half[name], (none[name] + fitted[name]) / 2)


def test_wider_networks_take_more_of_it_and_narrow_ones_none() -> None:
    """At 1.0x the average of the matched scales; with everything apart the closed form."""
    a, b, batches = parents()
    symmetry, first, matching = matched()
    both = pleas.collect_grouped(symmetry, first, matching, a, b, batches, SETTINGS)
    name = find_layer_norms(symmetry.program)[0].weight
    scales = {}
    for apart in (0.0, 0.5, 1.0):
        plan = pleas.make_plan(symmetry, both, matching, a, b, SETTINGS, apart=apart)
        if apart:
            with pytest.raises(pleas.InputError, match=r"call pleas\.collect_grouped after match"):
                pleas.assemble(symmetry, first, matching, plan, a, b, SETTINGS, example=batches[0][:2])
        result = pleas.assemble(symmetry, both, matching, plan, a, b, SETTINGS, example=batches[0][:2])
        assert plan.share_apart == pytest.approx(apart, abs=0.05)
        assert (name in result.averaged) == (apart == 0)
        scales[apart] = dict(result.module.state_dict())[name]
    assert torch.allclose(scales[0.5], (scales[0.0] + scales[1.0]) / 2, atol=0.05)
    assert float((scales[1.0] - scales[0.0]).abs().max()) > 0.1


def test_shards_of_the_second_pass_add_up_and_are_kept() -> None:
    a, b, batches = parents()
    symmetry, first, matching = matched()
    whole = pleas.collect_grouped(symmetry, first, matching, a, b, batches, SETTINGS)
    parts = [pleas.collect_grouped(symmetry, first, matching, a, b, [batch], SETTINGS) for batch in batches]
    name = find_layer_norms(symmetry.program)[0].name
    assert torch.allclose((parts[0] + parts[1]).norms[name].covariance, whole.norms[name].covariance)
    kept = pleas.Statistics.from_tensors(whole.to_tensors())
    assert torch.equal(kept.norms[name].second, whole.norms[name].second)


def test_a_network_merged_with_itself_keeps_its_scales() -> None:
    a, _, batches = parents()
    b = copy.deepcopy(a)
    result = pleas.merge(a, b, batches, apart=1.0, settings=SETTINGS)
    assert torch.allclose(outputs(result.module, batches[0]), outputs(a, batches[0]), rtol=1e-3, atol=1e-3)
