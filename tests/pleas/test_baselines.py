"""What merges are compared with: the parents side by side, and batch norms re-estimated on images."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pleas
from tests.merging import difference, evidence_of, images, outputs, parents


@pytest.mark.parametrize("count", [2, 3])
def test_an_ensemble_is_the_mean_or_all_of_the_answers(count: int) -> None:
    modules, x = parents("residual", count), images("residual", 4)
    answers = torch.stack([outputs(m, x) for m in modules])
    torch.testing.assert_close(outputs(pleas.Ensemble(*modules), x), answers.mean(0))
    beside = outputs(pleas.Ensemble(*modules, heads="separate"), x)
    assert torch.equal(beside, answers.movedim(0, 1).flatten(1))


def test_every_parent_of_an_ensemble_may_see_images_of_its_own() -> None:
    (a, b), x = parents("residual"), images("residual", 4)
    with torch.no_grad():
        found = pleas.Ensemble(a, b)(x, 2 * x)
    torch.testing.assert_close(found, (outputs(a, x) + outputs(b, 2 * x)) / 2)


@pytest.mark.parametrize("apart", [0.0, 0.5])
def test_batch_norms_take_the_statistics_of_the_images(apart: float) -> None:
    """Of the module and of the graph: one batch gives its own mean and variance."""
    evidence = evidence_of("residual", parents("residual"))
    plan = pleas.make_plan(evidence, apart=apart)
    module = pleas.assemble(evidence, plan, least_squares=False).module
    before = copy.deepcopy(module.state_dict())
    x = images("residual", 32)
    found = pleas.reestimate_bn(module, [x])
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])
    assert not found.training
    name = "0.1.running_mean"
    assert not torch.equal(found.state_dict()[name], before[name])
    if apart == 0:
        trained = copy.deepcopy(module)
        for m in trained.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.train()
                m.momentum = 1.0
        outputs(trained, x)
        state = found.state_dict()
        for key, value in trained.state_dict().items():
            if "running" in key:
                torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-4)


def test_copies_of_one_network_keep_its_function_on_many_batches() -> None:
    """Statistics from the images it sees: outputs move, and stay of the same size."""
    a, x = parents("residual")[0], images("residual", 64)
    found = pleas.reestimate_bn(a, list(x.split(32)))
    again = pleas.reestimate_bn(found, list(x.split(32)))
    assert difference(outputs(again, x), outputs(found, x)) < 1e-3
