"""Least squares on what the merged network feeds its layers, against dense least squares on what hooks see."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pleas
from pleas import Evidence, MergeSettings, Parents
from pleas.errors import InputError
from pleas.layers.layer import find_norms
from pleas.network.build import build, draw
from pleas.solve.propagate import Solved, held_out, propagate
from tests.cases import conv_bn, randomise
from tests.merging import (
    NAMES,
    SETTINGS,
    difference,
    evidence_of,
    images,
    outputs,
    parents,
    relatives,
    run,
    shuffled,
)
from tests.reference import ridge_by_lstsq, rows_by_unfold

# Every position of every image, in float64, so that explicit rows give the same numbers.
EVERY = MergeSettings(ridge=1e-3, head_ridge=1e-2, positions=10**4, rows=10**6)
CLOSE: dict[str, Any] = {"rtol": 1e-7, "atol": 1e-8}


@cache
def exact(name: str, count: int = 2) -> Evidence:
    modules = [copy.deepcopy(m).double() for m in relatives(name, count, 0.5)]
    x = images(name, 48).double()
    return pleas.gather(Parents.of(modules, x[:2], EVERY), list(x.split(20)))


def aligned(evidence: Evidence) -> list[nn.Module]:
    """The parents with their units in the common order."""
    made = []
    for module, state in zip(evidence.parents.modules, evidence.states, strict=True):
        own = copy.deepcopy(module)
        own.load_state_dict({key: state.get(key, value) for key, value in own.state_dict().items()})
        made.append(own)
    return made


def solve(evidence: Evidence, t: float, **plan: float) -> tuple[Solved, nn.Module]:
    made = pleas.make_plan(evidence, **(plan or {"budget": 1.0}))  # type: ignore[arg-type]
    drawing = draw(evidence.parents, made)
    (solved,) = propagate(evidence, drawing, [t])
    return solved, build(evidence.parents, made, drawing, solved.state)


def seen(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs of every module by name."""
    model, reads, gives = copy.deepcopy(model), {}, {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            gives[name] = output.clone()

        return hook

    def before(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            reads[name] = args[0].clone()

        return hook

    for name, module in model.named_modules():
        module.register_forward_pre_hook(before(name))
        module.register_forward_hook(keep(name))
    with torch.no_grad():
        model(x)
    return reads, gives


def fitted(evidence: Evidence) -> Tensor:
    """The images that layers are solved on."""
    x = torch.cat([batch if isinstance(batch, Tensor) else batch[0] for batch in evidence.inputs])
    settings = evidence.parents.settings
    return x[~held_out(len(x), settings.holdout, settings.seed)]


def rows_of(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.Conv2d):
        return rows_by_unfold(x, module.kernel_size, module.stride[0], module.padding[0])  # type: ignore[arg-type]
    return x


def mean(values: list[Tensor]) -> Tensor:
    return sum(values[1:], values[0]) / len(values)


@pytest.mark.parametrize(("t", "count"), [(0.0, 2), (1.0, 2), (0.7, 3)])
def test_every_layer_is_dense_least_squares_on_the_mixture(t: float, count: int) -> None:
    """t = 0: on the parents' mean inputs, towards their mean outputs. t = 1: on the rows of the merged network so far.
    After a block's last layer the target makes up for what the shortcut lacks, but not with t = 0."""
    evidence = exact("residual", count)
    solved, module = solve(evidence, t)
    x = fitted(evidence)
    ours = seen(module, x)
    theirs = [seen(parent, x) for parent in aligned(evidence)]
    layers = evidence.parents.layers
    assert len(layers) == len(solved.layers) == 12
    for layer in layers:
        conv, last = module.get_submodule(layer.name), layer.norm.name if layer.norm else layer.name
        z = (1 - t) * mean([reads[layer.name] for reads, _ in theirs]) + t * ours[0][layer.name]
        target = mean([gives[last] for _, gives in theirs])
        block, _, inner = layer.name.partition(".")
        if inner.startswith("expand") and t > 0:
            shortcut = f"{block}.shortcut"
            target = target + mean([gives[shortcut] for _, gives in theirs]) - ours[1][shortcut]
        rows, wanted = rows_of(conv, z), target if target.dim() == 2 else target.movedim(1, -1).flatten(0, 2)
        prior = mean([layer.matrix(state)[0] for state in evidence.states])
        ridge = EVERY.head_ridge if layer is layers[-1] else EVERY.ridge
        damping = ridge * float((rows - rows.mean(0)).square().mean())
        dense = ridge_by_lstsq(rows, wanted, prior, damping, intercept=True)
        found = solved.layers[layer.name]
        assert found.rows == len(rows)
        torch.testing.assert_close(found.weight, dense, **CLOSE)
        torch.testing.assert_close(found.bias, wanted.mean(0) - dense @ rows.mean(0), **CLOSE)


@pytest.mark.parametrize("apart", [0.0, 0.5])
@pytest.mark.parametrize(("name", "count"), [*((name, 2) for name in NAMES), ("residual", 3), ("grouped", 3)])
def test_what_the_last_layer_says_is_what_the_network_does(name: str, count: int, apart: float) -> None:
    """t = 1: the walk's merged network is the module that is built, on fitted and on held-out images."""
    evidence = evidence_of(name, parents(name, count), replace(SETTINGS, propagate=1.0, ridge=1e-3))
    solved, module = solve(evidence, 1.0, apart=apart)
    x = images(name)
    held = held_out(len(x), SETTINGS.holdout, SETTINGS.seed)
    target = outputs(pleas.Ensemble(*evidence.parents.modules), x).double()
    error = (outputs(module, x).double() - target).square()
    head = list(solved.layers.values())[-1]
    torch.testing.assert_close(head.residual, error[~held].mean(0), rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(head.target, target[~held].var(0, unbiased=False), rtol=1e-2, atol=1e-5)
    spread = (target[held] - target[held].mean(0)).square().sum()
    assert solved.held_out_error == pytest.approx(float(error[held].sum() / spread), rel=1e-2, abs=1e-6)


def test_the_stream_is_put_right_behind_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a ridge and with enough rows the sum after the first block is nearer to the parents' than without the
    correction, for everything before is the same; and so are the last block's and the logits."""
    modules = relatives("residual", 2, 0.5)
    evidence = evidence_of("residual", modules, replace(SETTINGS, ridge=1e-9, head_ridge=1e-9))
    x = fitted(evidence)
    sums = [[gives[f"{block}"] for block in (1, 2, 3)] for gives in (_sums(m, x) for m in aligned(evidence))]
    targets = [mean(list(pair)) for pair in zip(*sums, strict=True)]
    errors = []
    for corrected in (True, False):
        if not corrected:
            monkeypatch.setattr("pleas.solve.propagate._addends", lambda *_: ())
        solved, module = solve(evidence, 1.0)
        found = _sums(module, x)
        errors.append(
            [float((found[str(b)] - t).square().mean()) for b, t in zip((1, 2, 3), targets, strict=True)]
            + [solved.held_out_error]
        )
    assert errors[0][0] < errors[1][0]
    assert errors[0][2] < errors[1][2]
    assert errors[0][3] < errors[1][3]


def _sums(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What stands before the last ReLU of every residual block."""
    _, gives = seen(model, x)
    return {block: gives[f"{block}.shortcut"] + gives[f"{block}.expand"] for block in ("1", "2", "3")}


class Twice(nn.Module):
    """One convolution used at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared = conv_bn(3, 6), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.shared(self.stem(x)))
        return self.head(torch.relu(self.shared(x)).mean((2, 3)))


def twice(seed: int) -> nn.Module:
    return randomise(Twice().eval(), torch.Generator().manual_seed(seed)).double()


def test_a_shared_weight_is_solved_once_on_the_rows_of_all_its_places() -> None:
    x = images("residual", 48).double()
    made = Parents.of([twice(0), twice(1)], x[:2], EVERY)
    assert [len(layer.nodes) for layer in made.layers] == [1, 2, 1]
    evidence = pleas.gather(made, list(x.split(20)))
    solved, module = solve(evidence, 1.0)
    rows, wanted = [], []
    for place in range(2):
        found = [_place(parent, fitted(evidence), place) for parent in aligned(evidence)]
        rows.append(rows_by_unfold(mean([z for z, _ in found]), (3, 3), 1, 1))
        wanted.append(mean([y for _, y in found]).movedim(1, -1).flatten(0, 2))
    z, t = torch.cat(rows), torch.cat(wanted)
    prior = mean([made.layers[1].matrix(state)[0] for state in evidence.states])
    damping = EVERY.ridge * float((z - z.mean(0)).square().mean())
    dense = ridge_by_lstsq(z, t, prior, damping, intercept=True)
    torch.testing.assert_close(solved.layers["shared"].weight, dense, **CLOSE)
    torch.testing.assert_close(module.shared.weight.movedim(1, -1).flatten(1), dense, **CLOSE)  # type: ignore[union-attr,operator]


def _place(model: nn.Module, x: Tensor, place: int) -> tuple[Tensor, Tensor]:
    found: list[tuple[Tensor, Tensor]] = []
    model = copy.deepcopy(model)
    model.shared.register_forward_hook(lambda _, args, out: found.append((args[0], out.clone())))  # type: ignore[union-attr,operator]
    with torch.no_grad():
        model(x)
    return found[place]


@pytest.mark.parametrize("apart", [0.0, 0.5, 1.0])
def test_a_shared_weight_of_copies_comes_back_at_every_width(apart: float) -> None:
    a, x = twice(0), images("residual", 48).double()
    result = pleas.merge([a, shuffled(a, x[:2])], list(x.split(20)), apart=apart, settings=SETTINGS)
    assert difference(outputs(result.module, x), outputs(a, x)) < 1e-6
    assert (result.ratio == 2) == (apart == 1)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_a_norm_that_stands_alone_is_a_regression_of_every_unit(t: float) -> None:
    evidence = exact("pre_activation")
    solved, module = solve(evidence, t)
    x = fitted(evidence)
    ours, theirs = seen(module, x), [seen(parent, x) for parent in aligned(evidence)]
    norms = find_norms(evidence.parents.symmetry.program)
    assert len(norms) == 3
    for norm in norms:
        assert {norm.weight, norm.bias} <= solved.fitted
        scale, shift = norm.affine(solved.state)
        priors = [norm.affine(state) for state in evidence.states]
        z = (1 - t) * mean([reads[norm.name] for reads, _ in theirs]) + t * ours[0][norm.name]
        wanted = mean([gives[norm.name] for _, gives in theirs])
        for unit in range(len(scale)):
            rows, target = z[:, unit].reshape(-1, 1), wanted[:, unit].reshape(-1, 1)
            damping = EVERY.ridge * float((rows - rows.mean()).square().mean())
            prior = mean([own[0][unit] for own in priors]).view(1, 1)
            dense = ridge_by_lstsq(rows, target, prior, damping, intercept=True)
            assert float(scale[unit]) == pytest.approx(float(dense), rel=1e-6)
            assert float(shift[unit]) == pytest.approx(
                float(target.mean() - dense * rows.mean()), rel=1e-5, abs=1e-8
            )


def test_held_out_images_are_one_of_every_run() -> None:
    for images_, share, count in ((64, 0.125, 8), (64, 0.5, 32), (65, 0.125, 8), (10, 0.3, 3)):
        held = held_out(images_, share, seed=0)
        assert held.shape == (images_,)
        assert count <= int(held.sum()) <= count + 1
    held = held_out(64, 0.125, 0)
    assert held.view(8, 8).sum(1).tolist() == [1] * 8
    assert not torch.equal(held, held_out(64, 0.125, 1))
    assert torch.equal(held_out(1000, 0.125, 0)[:64].view(8, 8).sum(1), torch.ones(8).long())


def test_no_layer_is_solved_on_held_out_images() -> None:
    """Other pictures in their place change what they say of the network, and nothing of the network."""
    evidence = evidence_of("residual", relatives("residual"))
    x = images("residual")
    held = held_out(len(x), SETTINGS.holdout, SETTINGS.seed)
    x[held] = 5 * torch.randn(x[held].shape, generator=torch.Generator().manual_seed(1))
    other = replace(evidence, inputs=list(x.split(32)))
    first, second = (solve(one, 0.7, apart=0.5)[0] for one in (evidence, other))
    assert first.state.keys() == second.state.keys()
    for key, value in first.state.items():
        assert torch.equal(value, second.state[key]), key
    assert first.held_out_error != second.held_out_error


def test_batch_sizes_do_not_matter() -> None:
    evidence = evidence_of("grouped", relatives("grouped"))
    other = replace(evidence, inputs=list(images("grouped").split(7)))
    first, second = (solve(one, 0.7, apart=0.5)[0] for one in (evidence, other))
    assert first.held_out_error == pytest.approx(second.held_out_error, rel=1e-2)
    for key, value in first.state.items():
        torch.testing.assert_close(value, second.state[key], rtol=1e-2, atol=1e-2)


def test_several_mixtures_at_once_are_those_of_one_at_a_time() -> None:
    evidence = exact("residual")
    drawing = draw(evidence.parents, pleas.make_plan(evidence, apart=0.5))
    together = propagate(evidence, drawing, (0.0, 0.7, 1.0))
    assert [one.propagate for one in together] == [0.0, 0.7, 1.0]
    for one in together:
        (alone,) = propagate(evidence, drawing, [one.propagate])
        assert alone.held_out_error == pytest.approx(one.held_out_error)
        for key, value in alone.state.items():
            torch.testing.assert_close(value, one.state[key], rtol=1e-9, atol=1e-9)


def test_auto_keeps_the_mixture_that_is_nearest_on_held_out_images() -> None:
    modules = relatives("residual", 2, 0.5)
    auto = run("residual", *modules, settings=replace(SETTINGS, propagate="auto"), budget=1.0)
    assert list(auto.tried) == [0.0, 0.7, 1.0]
    assert auto.held_out_error == min(auto.tried.values())
    assert auto.propagate is not None
    assert auto.tried[auto.propagate] == auto.held_out_error
    fixed = run("residual", *modules, settings=replace(SETTINGS, propagate=auto.propagate), budget=1.0)
    x = images("residual", 8, seed=9)
    assert torch.equal(outputs(fixed.module, x), outputs(auto.module, x))
    assert fixed.tried == {auto.propagate: pytest.approx(auto.held_out_error)}


def test_evidence_of_every_layer_is_handed_on() -> None:
    result = run("residual", *relatives("residual"), budget=1.0)
    assert [layer.name for layer in result.layers] == [layer.name for layer in result.parents.layers]
    for layer in result.layers:
        assert 0 <= layer.residual < 1
        assert layer.rows > layer.unknowns / 4
    assert result.mean_residual == pytest.approx(sum(x.residual for x in result.layers) / len(result.layers))
    assert result.averaged == ()


def test_progress_is_told_at_every_layer() -> None:
    evidence, said = evidence_of("residual", relatives("residual")), []
    plan = pleas.make_plan(evidence, budget=1.0)
    pleas.assemble(evidence, plan, progress=lambda *x: said.append(x))
    assert len(said) == len(evidence.parents.layers)
    assert {what for what, *_ in said} == {"least squares"}
    assert [step for _, step, _ in said] == sorted(step for _, step, _ in said)
    assert all(step < steps for _, step, steps in said)


def test_no_images_are_refused() -> None:
    evidence = replace(evidence_of("residual", parents("residual")), inputs=[])
    with pytest.raises(InputError, match="no proxy images: least squares need at least one batch"):
        solve(evidence, 0.7)


def test_heads_are_held_closer_to_the_partial_merge() -> None:
    """A ridge of its own for the layers whose outputs are the network's."""
    modules = relatives("residual", 2, 0.5)
    solved = {
        ridge: solve(evidence_of("residual", modules, replace(SETTINGS, head_ridge=ridge)), 0.7)[0]
        for ridge in (1e-6, 1e6)
    }
    evidence = evidence_of("residual", modules)
    head, first = evidence.parents.layers[-1], evidence.parents.layers[0]
    prior = mean([head.matrix(state)[0] for state in evidence.states])
    torch.testing.assert_close(solved[1e6].layers[head.name].weight, prior, rtol=1e-3, atol=1e-3)
    assert float((solved[1e-6].layers[head.name].weight - prior).abs().max()) > 0.01
    assert torch.equal(solved[1e6].layers[first.name].weight, solved[1e-6].layers[first.name].weight)
