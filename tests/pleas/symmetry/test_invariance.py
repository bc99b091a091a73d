"""Invariant 1: a random permutation of every class leaves the outputs unchanged, on the module itself."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pleas.symmetry import Symmetry, execute, permute_state, position_maps, random, state_of, trace
from tests.cases import CASES, Residual, conv_bn, pooled_head, randomise


def outputs(symmetry: Symmetry, model: nn.Module, state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The module's own output on `state`; the program's where a rewrite gave it parameters of its own."""
    with torch.no_grad():
        if symmetry.program.added:
            return execute(symmetry.program.graph, [state], [images])[0]
        module = copy.deepcopy(model)
        module.load_state_dict({k: v for k, v in state.items() if k in module.state_dict()}, strict=False)
        return module(images)


def relative(output: Tensor, expected: Tensor) -> float:
    return float((output - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("rewrites", [("pad_to_conv",), ()], ids=["rewritten", "plain"])
@pytest.mark.parametrize("name", CASES)
def test_a_random_permutation_of_every_class_changes_nothing(name: str, rewrites: tuple[str, ...]) -> None:
    case = CASES[name]
    model = case.model()
    symmetry = trace(model, case.example(), strict=True, rewrites=rewrites)
    assert symmetry.gate_error < 1e-12
    images = case.example(5)
    state = state_of(symmetry.program, model)
    permuted = permute_state(symmetry, state, random(symmetry, torch.Generator().manual_seed(3)))
    assert relative(outputs(symmetry, model, permuted, images), model(images).detach()) < 1e-4
    assert symmetry.permutable_share() > 0.99


@pytest.mark.parametrize("name", CASES)
def test_leaving_one_tensor_in_place_breaks_the_function(name: str) -> None:
    case = CASES[name]
    model = case.model().double()
    symmetry = trace(model, case.example().double(), gate=False)
    images = case.example(5).double()
    state = state_of(symmetry.program, model)
    permutation = random(symmetry, torch.Generator().manual_seed(3))
    permuted = permute_state(symmetry, state, permutation)
    expected = outputs(symmetry, model, state, images)
    assert relative(outputs(symmetry, model, permuted, images), expected) < 1e-12
    moved = sorted({tensor for tensor, _ in position_maps(symmetry, permutation)})
    for tensor in moved:
        broken = permuted | {tensor: state[tensor]}
        assert relative(outputs(symmetry, model, broken, images), expected) > 1e-6, tensor


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """Small residual networks of random depth, widths, strides and groups."""
    width = draw(st.integers(2, 4)) * 2
    layers: list[nn.Module] = [conv_bn(3, width)]
    for _ in range(draw(st.integers(1, 3))):
        groups = draw(st.sampled_from([1, 2]))
        wider = width + 2 * draw(st.integers(0, 2))
        layers.append(Residual(width, wider, draw(st.sampled_from([1, 2])), groups))
        width = wider
    if draw(st.booleans()):
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 4))
    return nn.Sequential(*layers, pooled_head(width))


@settings(max_examples=4, deadline=None, derandomize=True)
@given(networks())
def test_random_residual_networks(model: nn.Module) -> None:
    randomise(model.eval(), torch.Generator().manual_seed(0))
    symmetry = trace(model, torch.randn(2, 3, 8, 8), strict=True)
    assert symmetry.gate_error < 1e-12
    assert symmetry.permutable_share() == 1.0
