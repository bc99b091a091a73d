"""The invariants of design 8 that concern a whole merge, on every kind of network in tests/cases.py."""

from __future__ import annotations

import copy
import importlib
import json
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pleas
from pleas import MergeResult, MergeSettings, Symmetry
from pleas.errors import ArchitectureMismatch, InputError, MergeFailed, NonFinite, TooFewRows
from pleas.symmetry import permute_state, random, state_of
from tests.cases import CASES

NAMES = sorted(CASES)
SETTINGS = MergeSettings(ridge=1e-6, positions=256, rows=1000)
SEPARATE = MergeSettings(ridge=1e-6, positions=256, rows=1000, heads="separate")


def images(name: str, count: int = 96, seed: int = 5) -> Tensor:
    shape = CASES[name].shape
    return torch.randn((count, *shape[1:]), generator=torch.Generator().manual_seed(seed))


@cache
def traced(name: str) -> Symmetry:
    return pleas.trace(CASES[name].model(0), CASES[name].example())


@cache
def parents(name: str) -> tuple[nn.Module, nn.Module]:
    return CASES[name].model(0), CASES[name].model(1)


def permuted_copy(name: str) -> nn.Module:
    model = copy.deepcopy(parents(name)[0])
    symmetry = pleas.trace(
        model, CASES[name].example(), rewrites=()
    )  # what the module's own tensors can express
    permutation = random(symmetry, torch.Generator().manual_seed(3))
    state = permute_state(symmetry, state_of(symmetry.program, model), permutation)
    model.load_state_dict({k: state.get(k, v) for k, v in model.state_dict().items()})
    return model


def run(
    name: str,
    a: nn.Module,
    b: nn.Module,
    settings: MergeSettings = SETTINGS,
    *,
    budget: float | None = None,
    apart: float | None = None,
) -> MergeResult:
    batches = images(name).split(32)
    symmetry = traced(name)
    statistics = pleas.collect(symmetry, a, b, batches, settings)
    matching = pleas.match(symmetry, statistics, a, b, settings)
    statistics = pleas.collect_grouped(symmetry, statistics, matching, a, b, batches, settings)
    made = pleas.make_plan(symmetry, statistics, matching, a, b, settings, budget=budget, apart=apart)
    return pleas.assemble(symmetry, statistics, matching, made, a, b, settings, example=CASES[name].example())


def outputs(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


def difference(ours: Tensor, expected: Tensor) -> float:
    """Largest error relative to the scale of the expected output."""
    return float((ours - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("matching", ["activation", "weight"])
def test_merging_a_permuted_copy_gives_the_model_back(name: str, matching: str) -> None:
    """Invariant 2: 1.0x, logits within 1e-3 of their scale."""
    a, x = parents(name)[0], images(name, 16, seed=9)
    settings = MergeSettings(ridge=1e-6, positions=256, rows=1000, matching=matching)  # type: ignore[arg-type]
    result = run(name, a, permuted_copy(name), settings, budget=1.0)
    assert difference(outputs(result.module, x), outputs(a, x)) < 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("apart", [0.25, 0.5])
def test_merging_a_permuted_copy_gives_the_model_back_at_every_width(name: str, apart: float) -> None:
    """The gate of widening: every shape constant, slice and block has to be right for this to hold."""
    a, x = parents(name)[0], images(name, 16, seed=9)
    result = run(name, a, permuted_copy(name), apart=apart)
    assert difference(outputs(result.module, x), outputs(a, x)) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_fully_apart_is_the_ensemble(name: str) -> None:
    """Invariant 3, shared head: the mean of the parents' logits at twice the cost of one."""
    a, b = parents(name)
    result = run(name, a, b, apart=1.0)
    x = images(name, 16, seed=9)
    assert difference(outputs(result.module, x), outputs(pleas.Ensemble(a, b), x)) < 1e-4
    fused = run(name, a, b, apart=0.0)
    if name == "shared_conv":  # a tied weight with two biases is no layer: it is computed with its zeros
        assert result.flops > 2 * fused.flops
    else:
        assert result.flops == 2 * fused.flops


@pytest.mark.parametrize("name", NAMES)
def test_fully_apart_with_two_heads_is_both_parents(name: str) -> None:
    a, b = parents(name)
    result = run(name, a, b, SEPARATE, apart=1.0)
    x = images(name, 16, seed=9)
    classes = outputs(a, x).shape[1]
    assert result.module.head_sizes == (classes, classes)
    assert difference(outputs(result.module, x), outputs(pleas.Ensemble(a, b, "separate"), x)) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_the_plans_and_grow_with_the_budget(name: str) -> None:
    """Invariant 9 with it: more budget never predicts more error."""
    a, b = parents(name)
    results = [run(name, a, b, budget=budget) for budget in (1.0, 1.3, 1.6, 2.0)]
    for budget, result in zip((1.0, 1.3, 1.6, 2.0), results, strict=True):
        assert result.flops == result.plan.flops
        assert budget == 1.0 or result.plan.ratio <= budget + 0.05
    errors = [result.plan.predicted_error for result in results]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_widened_network_is_rebuilt_from_plain_data(name: str) -> None:
    """Invariant 7, without files: JSON and a state dict give the same outputs, bit for bit."""
    result = run(name, *parents(name), apart=0.5)
    config = pleas.program_config(result.module)
    assert config is not None
    again = pleas.module_from_config(json.loads(json.dumps(config)))
    again.load_state_dict(result.module.state_dict())
    x = images(name, 8, seed=9)
    assert torch.equal(outputs(again, x), outputs(result.module, x))
    assert torch.equal(outputs(copy.deepcopy(result.module), x), outputs(result.module, x))


@pytest.mark.parametrize("name", NAMES)
def test_one_times_is_the_parents_own_class(name: str) -> None:
    a, b = parents(name)
    result = run(name, a, b, budget=1.0)
    if not result.symmetry.program.added:
        assert type(result.module) is type(a)
        assert pleas.program_config(result.module) is None
        assert sum(p.numel() for p in a.parameters()) == result.parameters


@pytest.mark.parametrize("name", NAMES)
def test_statistics_of_shards_add_up(name: str) -> None:
    """Invariant 6: two shards summed are the whole, in any order, whatever the batch size."""
    a, b = parents(name)
    symmetry, x = traced(name), images(name, 40)
    settings = MergeSettings(positions=5)
    whole = pleas.collect(symmetry, a, b, x.split(8), settings, images=40)
    first = pleas.collect(symmetry, a, b, x[:24].split(5), settings, images=40)
    second = pleas.collect(symmetry, a, b, x[24:].split(16), settings, first_image=24, images=40)
    for total in (first + second, second + first):
        assert total.images == whole.images
        for kind in ("joint", "units"):
            for layer, moments in getattr(whole, kind).items():
                other = getattr(total, kind)[layer]
                torch.testing.assert_close(other.covariance, moments.covariance, rtol=1e-4, atol=1e-5)
    tensors = pleas.Statistics.to_tensors(whole)
    for key, tensor in pleas.Statistics.from_tensors(tensors).to_tensors().items():
        assert torch.equal(tensor, tensors[key])


@pytest.mark.parametrize("allocation", ["error", "uniform", "zip"])
def test_every_allocation_spends_its_budget(allocation: str) -> None:
    settings = MergeSettings(ridge=1e-6, positions=256, rows=1000, allocation=allocation)  # type: ignore[arg-type]
    result = run("residual", *parents("residual"), settings, budget=1.5)
    assert 1.35 < result.ratio <= 1.5


def test_least_squares_beats_permutation_alone_on_its_own_targets() -> None:
    """On relatives: B is a permuted copy of A whose weights then moved by half their size."""
    a, b = parents("residual")[0], permuted_copy("residual")
    generator = torch.Generator().manual_seed(11)
    for p in b.parameters():
        p.data += 0.5 * p.data.std() * torch.randn(p.shape, generator=generator) if p.numel() > 1 else 0
    full = run("residual", a, b, budget=1.0)
    average = pleas.permutation_only(traced("residual"), full.matching, a, b)
    x = images("residual", 64, seed=9)
    target = outputs(pleas.Ensemble(a, b), x)
    error = [float((outputs(m, x) - target).square().mean()) for m in (full.module, average)]
    assert error[0] < 0.5 * error[1]


def test_same_inputs_give_the_same_bytes() -> None:
    states = [run("residual", *parents("residual"), apart=0.25).module.state_dict() for _ in range(2)]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key])


def test_parents_are_left_as_they_were() -> None:
    a, b = (copy.deepcopy(m) for m in parents("residual"))
    a.train()
    before = {k: v.clone() for k, v in a.state_dict().items()}
    pleas.merge(a.eval(), b, images("residual").split(32), budget=1.5)
    for key, value in a.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.grad is None for p in a.parameters())


def test_merge_in_one_call_with_different_label_sets() -> None:
    case = CASES["residual"]
    a, b = case.model(0), case.model(1)
    last = [m for m in b.modules() if isinstance(m, nn.Linear)][-1]
    last.weight = nn.Parameter(torch.randn(3, last.in_features))
    last.bias = nn.Parameter(torch.randn(3))
    last.out_features = 3
    result = pleas.merge(a, b, images("residual").split(32), apart=1.0, settings=SEPARATE)
    x = images("residual", 8, seed=9)
    assert result.module.head_sizes == (5, 3)
    assert difference(outputs(result.module, x), torch.cat([outputs(a, x), outputs(b, x)], 1)) < 1e-4


def test_two_architectures_are_refused_with_the_tensors_that_differ() -> None:
    a, b = parents("residual")[0], parents("plain")[0]
    with pytest.raises(ArchitectureMismatch, match=r"not one architecture.*\n  only in A: .*\n  only in B: "):
        pleas.merge(a, b, [images("residual")], budget=1.0)
    wide = copy.deepcopy(a)
    last = [m for m in wide.modules() if isinstance(m, nn.Linear)][-1]
    last.weight, last.bias = nn.Parameter(torch.randn(7, last.in_features)), nn.Parameter(torch.randn(7))
    with pytest.raises(ArchitectureMismatch, match=r"\(5, \d+\) in A, \(7, \d+\) in B(.|\n)*separate heads"):
        pleas.merge(a, wide, [images("residual")], budget=1.0)


def test_damaged_weights_and_exploding_activations_are_named() -> None:
    a, b = (copy.deepcopy(m) for m in parents("residual"))
    next(iter(b.parameters())).data[0] = float("nan")
    with pytest.raises(NonFinite, match=r"parent b: weights '.*' hold NaN"):
        pleas.merge(a, b, [images("residual")], budget=1.0)
    with pytest.raises(NonFinite, match=r"parent a: the input of layer '.*' is NaN or infinite"):
        pleas.merge(a, a, [images("residual") * float("inf")], budget=1.0)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"budget": 2.5}, "budget = 2.5: must lie between 1.0"),
        ({"apart": -0.1}, "apart = -0.1: must lie between 0"),
        ({}, "exactly one of budget"),
        ({"budget": 1.5, "apart": 0.5}, "exactly one of budget"),
    ],
)
def test_impossible_plans_are_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run("residual", *parents("residual"), **plan)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(TooFewRows, match=r"layer '.*': \d+ rows for \d+ unknowns"):
        pleas.merge(*parents("plain"), [images("plain", 2)], budget=1.0)


def test_no_images_and_one_shot_iterators_are_refused() -> None:
    a, b = parents("residual")
    with pytest.raises(InputError, match="no proxy images"):
        pleas.merge(a, b, [], budget=1.0, example=CASES["residual"].example())
    with pytest.raises(InputError, match="one-shot iterator"):
        pleas.merge(a, b, iter([images("residual")]), budget=1.0)


def test_a_widened_graph_that_is_not_the_parents_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run-time guard: here entries of fused units are averaged wrongly."""
    merge = importlib.import_module("pleas.merge")  # `pleas.merge` itself is the function
    right = merge.average

    def wrong(name: str, *rest: Any) -> Tensor:
        return right(name, *rest) * (0.9 if name.endswith("weight") else 1.0)

    monkeypatch.setattr(merge, "average", wrong)
    with pytest.raises(MergeFailed, match="does not compute what the parents do"):
        run("residual", *parents("residual"), apart=0.5)
