"""The invariants of a whole merge, of two, three and five parents, on every kind of network in tests/cases.py."""

from __future__ import annotations

import copy
import importlib
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pleas
from pleas import MergeSettings
from pleas.errors import ArchitectureMismatch, InputError, MergeFailed, NonFinite, TooFewRows
from tests.merging import (
    NAMES,
    SEPARATE,
    SETTINGS,
    difference,
    evidence_of,
    images,
    outputs,
    parents,
    permuted_copy,
    relatives,
    run,
)

THREE = ["residual", "option_a", "grouped", "concatenating", "plain"]
COUNTS = [(name, 2) for name in NAMES] + [(name, 3) for name in THREE] + [("residual", 5), ("grouped", 5)]
WIDTHS = [(*case, share) for case in COUNTS for share in (0.0, 0.25, 0.5) if share == 0.5 or case[1] == 2]


def family(name: str, count: int) -> tuple[nn.Module, ...]:
    """A network and permuted copies of it."""
    return (parents(name)[0], *(permuted_copy(name, seed) for seed in range(3, 2 + count)))


@pytest.mark.parametrize(("name", "count", "apart"), WIDTHS)
def test_merging_permuted_copies_gives_the_model_back_at_every_width(
    name: str, count: int, apart: float
) -> None:
    """The gate of widening: every shape constant, slice and block has to be right for this to hold."""
    a, x = parents(name)[0], images(name, 16, seed=9)
    result = run(name, *family(name, count), apart=apart)
    assert difference(outputs(result.module, x), outputs(a, x)) < 1e-3
    assert (result.plan.share_apart > 0) == (apart > 0)
    assert result.held_out_error is not None
    assert result.held_out_error < 1e-6


@pytest.mark.parametrize(("name", "count"), [*((name, 2) for name in NAMES), ("residual", 3), ("grouped", 3)])
def test_matching_by_weights_gives_permuted_copies_back(name: str, count: int) -> None:
    a, x = parents(name)[0], images(name, 16, seed=9)
    settings = replace(SETTINGS, matching="weight")
    result = run(name, *family(name, count), settings=settings, budget=1.0)
    assert difference(outputs(result.module, x), outputs(a, x)) < 1e-3


@pytest.mark.parametrize(("name", "count"), COUNTS)
def test_fully_apart_is_the_ensemble(name: str, count: int) -> None:
    """The mean of the parents' logits, at exactly as many times the cost of one."""
    modules = parents(name, count)
    result = run(name, *modules, apart=1.0)
    x = images(name, 16, seed=9)
    assert difference(outputs(result.module, x), outputs(pleas.Ensemble(*modules), x)) < 1e-4
    fused = pleas.make_plan(evidence_of(name, modules), apart=0.0)
    if name == "shared_conv":  # a tied weight with two biases is no layer: it is computed with its zeros
        assert result.flops > count * fused.flops
    else:
        assert result.flops == count * fused.flops


@pytest.mark.parametrize(("name", "count"), [*((name, 2) for name in NAMES), ("residual", 3), ("plain", 3)])
def test_fully_apart_with_separate_heads_is_every_parent(name: str, count: int) -> None:
    modules = parents(name, count)
    result = run(name, *modules, settings=SEPARATE, apart=1.0)
    x = images(name, 16, seed=9)
    classes = outputs(modules[0], x).shape[1]
    assert result.module.head_sizes == (classes,) * count
    side_by_side = pleas.Ensemble(*modules, heads="separate")
    assert difference(outputs(result.module, x), outputs(side_by_side, x)) < 1e-4
    if name not in (
        "shared_conv",
        "option_a",
    ):  # their rewritten graphs have layers that the modules have not
        assert result.flops == count * result.parent_flops


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_the_plans_and_grow_with_the_budget(name: str) -> None:
    """More budget never predicts more error."""
    evidence = evidence_of(name, parents(name))
    budgets = (1.0, 1.3, 1.6, 2.0)
    plans = [pleas.make_plan(evidence, budget=budget) for budget in budgets]
    result = pleas.assemble(evidence, plans[1], least_squares=False)
    assert result.flops == result.plan.flops
    assert result.averaged
    assert not result.layers
    for budget, plan in zip(budgets, plans, strict=True):
        assert budget == 1.0 or plan.ratio <= budget + 0.05
    assert [plan.flops for plan in plans] == sorted(plan.flops for plan in plans)
    errors = [plan.predicted_error or 0.0 for plan in plans[1:]]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("name", "count"), [*((name, 2) for name in NAMES), ("residual", 3)])
def test_a_widened_network_is_rebuilt_from_plain_data(name: str, count: int) -> None:
    """JSON and a state dict give the same outputs, bit for bit."""
    evidence = evidence_of(name, parents(name, count))
    result = pleas.assemble(evidence, pleas.make_plan(evidence, apart=0.5), least_squares=False)
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
    if not result.parents.symmetry.program.added:
        assert type(result.module) is type(a)
        assert pleas.program_config(result.module) is None
        assert sum(p.numel() for p in a.parameters()) == result.parameters


@pytest.mark.parametrize("apart", [0.0, 0.5])
@pytest.mark.parametrize("name", ["residual", "concatenating", "depthwise"])
def test_one_parent_twice_is_that_parent(name: str, apart: float) -> None:
    a, x = parents(name)[0], images(name, 16, seed=9)
    for modules in ((a, a), (a, a, a)):
        result = run(name, *modules, apart=apart)
        assert difference(outputs(result.module, x), outputs(a, x)) < 1e-4


@pytest.mark.parametrize(("name", "count"), [("residual", 2), ("residual", 3), ("option_a", 3)])
def test_the_order_of_the_parents_does_not_matter(name: str, count: int) -> None:
    """Of relatives, where the matching leaves no choice."""
    modules, x = relatives(name, count), images(name, 16, seed=9)
    for apart in (0.0, 0.5):
        there, back = (run(name, *order, apart=apart) for order in (modules, modules[::-1]))
        assert there.flops == back.flops
        assert difference(outputs(back.module, x), outputs(there.module, x)) < 1e-3


@pytest.mark.parametrize("count", [2, 3])
def test_least_squares_beats_permutation_alone_on_its_own_targets(count: int) -> None:
    modules = relatives("residual", count, 0.5)
    evidence = evidence_of("residual", modules)
    plan = pleas.make_plan(evidence, budget=1.0)
    solved, average = (pleas.assemble(evidence, plan, least_squares=on).module for on in (True, False))
    x = images("residual", 64, seed=9)
    target = outputs(pleas.Ensemble(*modules), x)
    error = [float((outputs(m, x) - target).square().mean()) for m in (solved, average)]
    assert error[0] < 0.5 * error[1]


def test_more_budget_brings_the_merge_closer_to_the_ensemble() -> None:
    evidence = evidence_of("residual", relatives("residual", 2, 0.5))
    found = [pleas.assemble(evidence, pleas.make_plan(evidence, apart=share)) for share in (0.0, 0.5, 1.0)]
    errors = [result.held_out_error or 0.0 for result in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6


def test_same_inputs_give_the_same_bytes() -> None:
    """Every seed is part of the settings; the global generator is left where it was."""
    a, b = parents("residual")
    torch.manual_seed(7)
    before, states = torch.get_rng_state(), []
    for _ in range(2):
        result = pleas.merge(a, b, list(images("residual").split(32)), apart=0.25, settings=SETTINGS)
        states.append(result.module.state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key])


def test_parents_are_left_as_they_were_also_in_training_mode() -> None:
    """Batch norms would otherwise see the proxies, and dropout the parents' targets."""
    a, b = (copy.deepcopy(m).train() for m in parents("residual"))
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (a, b)]
    result = pleas.merge([a, b], list(images("residual").split(32)), budget=1.5, settings=SETTINGS)
    for module, old in zip((a, b), before, strict=True):
        assert module.training
        assert all(m.training for m in module.modules())
        assert all(p.grad is None and p.requires_grad for p in module.parameters())
        for key, value in module.state_dict().items():
            assert torch.equal(value, old[key])
    assert not result.module.training
    assert torch.is_grad_enabled()
    x = images("residual", 8, seed=9)
    frozen = pleas.merge(
        parents("residual"), list(images("residual").split(32)), budget=1.5, settings=SETTINGS
    )
    assert torch.equal(outputs(result.module, x), outputs(frozen.module, x))


def test_both_ways_of_calling_are_one() -> None:
    a, b = parents("residual")
    x, batches = images("residual", 8, seed=9), list(images("residual").split(32))
    said: list[str] = []
    listed = pleas.merge(
        [a, b], batches, budget=1.2, settings=SETTINGS, progress=lambda what, *_: said.append(what)
    )
    loose = pleas.merge(a, b, batches, budget=1.2, settings=SETTINGS)
    assert torch.equal(outputs(listed.module, x), outputs(loose.module, x))
    assert list(dict.fromkeys(said)) == ["statistics", "least squares"]
    text = repr(listed)
    assert text.startswith("MergeResult(2 parents, 1.1")
    assert "held-out error" in text


@pytest.mark.parametrize(
    ("sizes", "apart"), [((5, 3), 0.5), ((3, 5), 1.0), ((5, 3, 7), 0.0), ((5, 3, 7), 1.0)]
)
def test_different_label_sets_are_heads_side_by_side(sizes: tuple[int, ...], apart: float) -> None:
    modules = [with_classes(m, size) for m, size in zip(parents("residual", 3), sizes, strict=False)]
    result = pleas.merge(modules, list(images("residual").split(32)), apart=apart, settings=SEPARATE)
    x = images("residual", 8, seed=9)
    assert result.module.head_sizes == sizes
    assert outputs(result.module, x).shape == (8, sum(sizes))
    if apart == 1:
        expected = torch.cat([outputs(m, x) for m in modules], 1)
        assert difference(outputs(result.module, x), expected) < 1e-4


def with_classes(model: nn.Module, classes: int) -> nn.Module:
    """A copy with so many outputs."""
    made = copy.deepcopy(model)
    last = [m for m in made.modules() if isinstance(m, nn.Linear)][-1]
    generator = torch.Generator().manual_seed(classes)
    last.weight = nn.Parameter(torch.randn((classes, last.in_features), generator=generator))
    last.bias = nn.Parameter(torch.randn(classes, generator=generator))
    last.out_features = classes
    return made


def test_parents_that_normalise_differently_get_images_of_their_own() -> None:
    """A copy that looks at doubled images through halved first weights is the parent itself."""
    a, halved = parents("residual")[0], copy.deepcopy(permuted_copy("residual"))
    first = next(m for m in halved.modules() if isinstance(m, nn.Conv2d))
    first.weight.data /= 2
    batches = [(x, 2 * x) for x in images("residual").split(32)]
    result = pleas.merge([a, halved], batches, budget=1.0, settings=SETTINGS)
    assert result.held_out_error is not None
    assert result.held_out_error < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_kept(dtype: torch.dtype) -> None:
    a, b = (copy.deepcopy(m).to(dtype) for m in (parents("residual")[0], permuted_copy("residual")))
    batches = list(images("residual").to(dtype).split(32))
    result = pleas.merge([a, b], batches, apart=0.5, settings=SETTINGS)
    assert {p.dtype for p in result.module.parameters()} == {dtype}
    error = difference(outputs(result.module, batches[0]), outputs(a, batches[0]))
    assert error < (1e-8 if dtype == torch.float64 else 0.2)


def test_two_architectures_are_refused_with_the_tensors_that_differ() -> None:
    a, b = parents("residual")[0], parents("plain")[0]
    with pytest.raises(ArchitectureMismatch, match=r"not one architecture.*\n  only in a: .*\n  only in b: "):
        pleas.merge(a, b, [images("residual")], budget=1.0)
    with pytest.raises(ArchitectureMismatch, match=r"\(5, \d+\) in a, \(7, \d+\) in c(.|\n)*separate heads"):
        pleas.merge([a, a, with_classes(a, 7)], [images("residual")], budget=1.0)


def test_damaged_weights_and_exploding_activations_are_named() -> None:
    a, b = (copy.deepcopy(m) for m in parents("residual"))
    next(iter(b.parameters())).data[0] = float("nan")
    with pytest.raises(NonFinite, match=r"parent b: weights '.*' hold NaN"):
        pleas.merge(a, b, [images("residual")], budget=1.0)
    with pytest.raises(NonFinite, match=r"parent a: the input of layer '.*' is NaN or infinite"):
        pleas.merge(a, a, [images("residual") * float("inf")], budget=1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda a, x: (a, a), "merge takes networks and then batches of images.*it got no batches"),
        (
            lambda a, x: ([a, a], x[0]),
            r"inputs is one tensor of shape \(96, 3, 16, 16\): give a list of batches",
        ),
        (lambda a, x: (x, [a, a]), "it got Tensor"),
        (lambda a, x: (a, "b", x), "it got str"),
        (lambda a, x: ([a], x), "1 parent: a merge takes 2 to 16 networks"),
        (lambda a, x: ([a, a], iter(x)), "one-shot iterator"),
        (lambda a, x: ([a, a], []), "no proxy images: inputs is empty"),
        (lambda a, x: (), "it got no batches"),
        (lambda a, x: ([a, a],), "it got no batches"),
        (lambda a, x: (a, a, None), "it got no batches"),
    ],
)
def test_wrong_calls_are_told_the_right_one(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pleas.merge(*given(parents("residual")[0], [images("residual")]), budget=1.0)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(TooFewRows, match=r"layer '.*': \d+ rows for \d+ unknowns"):
        pleas.merge(parents("plain"), [images("plain", 2)], budget=1.0)


def test_a_widened_graph_that_is_not_the_parents_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run-time guard: here entries of fused units are averaged wrongly."""
    stage = importlib.import_module("pleas.assemble")  # `pleas.assemble` itself is the function
    right = stage.average

    def wrong(name: str, *rest: Any) -> Tensor:
        return right(name, *rest) * (0.9 if name.endswith("weight") else 1.0)

    monkeypatch.setattr(stage, "average", wrong)
    with pytest.raises(MergeFailed, match="does not compute what the parents do"):
        run("residual", *parents("residual"), apart=0.5)


def test_settings_of_a_merge_are_checked_where_they_are_made() -> None:
    for given, message in (
        ({"matching": "luck"}, "matching = 'luck': must be one of activation, weight"),
        ({"propagate": 2}, r'propagate = 2: must be "auto" or a number from 0'),
        ({"ridge": 0}, "ridge = 0: must be > 0, for example 1e-2"),
        ({"rows": 0}, "rows = 0: must be at least 1"),
        ({"holdout": 0.9}, "holdout = 0.9: must be above 0 and at most 0.5"),
    ):
        with pytest.raises(InputError, match=message):
            MergeSettings(**given)  # type: ignore[arg-type]


def test_a_network_and_its_copy_in_half_precision_merge_to_it() -> None:
    """Nearly equal parents: what fusing loses is rounding, which must not blow up where costs are solved for."""
    a = parents("residual")[0]
    evidence, x = evidence_of("residual", (a, copy.deepcopy(a).half().float())), images("residual", 8)
    for budget in (1.0, 1.5, 2.0):
        result = pleas.assemble(evidence, pleas.make_plan(evidence, budget=budget))
        assert difference(outputs(result.module, x), outputs(a, x)) < 1e-3
