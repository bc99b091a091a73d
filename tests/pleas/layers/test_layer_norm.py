"""Scales and shifts of layer norms, against an explicit regression on explicit rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pleas
from pleas import MergeSettings, Parents
from pleas.layers.layer_norm import find_layer_norms
from pleas.network.build import draw
from pleas.solve.propagate import held_out, propagate
from tests.cases import randomise
from tests.merging import difference, outputs
from tests.pleas.test_transformers import vit
from tests.reference import ridge_by_lstsq

SETTINGS = MergeSettings(ridge=1e-3, positions=256, rows=10**6, propagate=0.7)


def networks() -> tuple[nn.Module, nn.Module, list[Tensor]]:
    built = [randomise(vit().eval(), torch.Generator().manual_seed(seed)).double() for seed in (0, 1)]
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(5)).double()
    return built[0], built[1], list(images.split(32))


def test_every_layer_norm_of_a_transformer_is_found() -> None:
    a, _, batches = networks()
    found = find_layer_norms(pleas.trace(a, batches[0][:2]).program)
    assert {norm.name for norm in found} == {
        name for name, module in a.named_modules() if isinstance(module, nn.LayerNorm)
    }
    for norm in found:
        assert isinstance(a.get_submodule(norm.name), nn.LayerNorm)
        scale, shift = norm.affine(a.state_dict())
        assert norm.unfolded(scale, shift, {}) == {norm.weight: scale, norm.bias: shift}


class Tied(nn.Module):
    """One layer norm at two places, and one without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.free, self.head = (
            nn.LayerNorm(6),
            nn.LayerNorm(6, elementwise_affine=False),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.free(self.norm(torch.relu(self.norm(x)))))


def test_norms_that_stand_twice_or_have_no_parameters_are_left_to_averaging() -> None:
    a = randomise(Tied().eval(), torch.Generator().manual_seed(0))
    assert find_layer_norms(pleas.trace(a, torch.randn(2, 6)).program) == ()
    result = pleas.merge([a, a], [torch.randn(64, 6)], budget=1.0)
    assert set(result.averaged) == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_the_first_norm_is_the_regression_of_each_unit(t: float) -> None:
    """On the normalised mean of the parents' inputs or what the merged network gives, towards their mean outputs."""
    a, b, batches = networks()
    evidence = pleas.gather(Parents.of([a, b], batches[0][:2], SETTINGS), batches)
    drawing = draw(evidence.parents, pleas.make_plan(evidence, budget=1.0))
    (solved,) = propagate(evidence, drawing, [t])
    norm = find_layer_norms(evidence.parents.symmetry.program)[0]
    x = torch.cat(batches)
    x = x[~held_out(64, SETTINGS.holdout, SETTINGS.seed)]
    reads, gives = [], []
    for parent, state in zip((a, b), evidence.states, strict=True):
        read, give = _at(parent, norm.name, state, x)
        reads.append(read)
        gives.append(give)
    merged = _at(a, norm.name, solved.state, x)[0]
    z = F.layer_norm((reads[0] + reads[1]) / 2 if t == 0 else merged, (24,), eps=norm.eps).flatten(0, 1)
    wanted = ((gives[0] + gives[1]) / 2).flatten(0, 1)
    for unit in range(24):
        rows, target = z[:, unit, None], wanted[:, unit, None]
        damping = SETTINGS.ridge * float((rows - rows.mean()).square().mean())
        prior = sum(state[norm.weight][unit] for state in evidence.states) / 2
        dense = float(ridge_by_lstsq(rows, target, prior.view(1, 1), damping, intercept=True))  # type: ignore[union-attr]
        assert float(solved.state[norm.weight][unit]) == pytest.approx(dense, rel=1e-6)
        shift = float(target.mean() - dense * rows.mean())
        assert float(solved.state[norm.bias][unit]) == pytest.approx(shift, rel=1e-6, abs=1e-9)


def _at(model: nn.Module, name: str, state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """What a module with these tensors reads and gives."""
    found: list[Any] = []
    model = copy.deepcopy(model)
    model.load_state_dict({key: state.get(key, value) for key, value in model.state_dict().items()})
    model.get_submodule(name).register_forward_hook(lambda _, args, out: found.append((args[0], out)))
    with torch.no_grad():
        model(x)
    return found[0]


@pytest.mark.parametrize("apart", [0.0, 0.5])
def test_norms_are_fitted_and_say_so(apart: float) -> None:
    a, b, batches = networks()
    result = pleas.merge([a, b], batches, apart=apart, settings=SETTINGS)
    norms = find_layer_norms(result.parents.symmetry.program)
    assert not {norm.weight for norm in norms} & set(result.averaged)
    scale = result.module.state_dict()[norms[0].weight]
    assert scale.shape == (24 * (1 + apart),)


def test_a_network_merged_with_itself_keeps_its_scales() -> None:
    a, _, batches = networks()
    result = pleas.merge([a, copy.deepcopy(a)], batches, apart=1.0, settings=SETTINGS)
    assert difference(outputs(result.module, batches[0]), outputs(a, batches[0])) < 1e-6
