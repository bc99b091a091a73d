"""What a distillation may start from: networks of the merged network's shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.common import pair_of, plain_average
from benchmarks.refine import Case, starts
from datafree.recipe.file import parse_recipe

RECIPE = """
name: toy
parents:
  a: {model: python:datafree.digits:digits_resnet, random_weights: true, preprocess: {size: 8, mean: [0.5], std: [0.4]}}
  b: {model: python:datafree.digits:digits_resnet, random_weights: true, preprocess: {size: 8, mean: [0.5], std: [0.4]}}
labels: LABELS
proxy: {count: 32, sources: [{kind: noise}]}
merge: {budgets: [1.0]}
evaluate: [{name: upright, expert: a, images: {digits: {split: test}}}]
"""


@pytest.fixture(scope="module", params=["shared", "separate"])
def case(request: pytest.FixtureRequest) -> Case:
    recipe = parse_recipe(RECIPE.replace("LABELS", request.param), "toy.yaml")
    return Case(pair_of(recipe, "cpu"), 0, 32)


def answers(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network(x)


def test_one_parent_in_every_place_answers_as_it_does_alone(case: Case) -> None:
    made, x = starts(case, 1.5), next(iter(case.pair.inputs(case.proxies).merged()))
    for number, parent in enumerate(case.pair.parents.each):
        found, expected = answers(made[f"parent {parent.name}"](), x), answers(parent.module, x)
        head = slice(10 * number, 10 * number + 10) if case.pair.separate else slice(None)
        torch.testing.assert_close(found[:, head], expected, rtol=1e-4, atol=1e-5)
    assert answers(made["random"](), x).shape == answers(made["permutation only"](), x).shape


def test_the_plain_average_is_the_mean_of_the_weights(case: Case) -> None:
    networks = case.pair.networks(case.pair.settings(0))
    average = plain_average(networks).module.state_dict()
    one, other = (parent.module.state_dict() for parent in case.pair.parents.each)
    name = next(name for name, value in one.items() if value.dim() == 4)
    torch.testing.assert_close(average[name], (one[name] + other[name]) / 2)
