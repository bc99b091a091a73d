"""What tests of the mathematics share: parents of every case, evidence about them, and a whole merge in one call."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor, nn

import pleas
from pleas import Evidence, MergeResult, MergeSettings, Parents, Symmetry
from pleas.symmetry import logits_of, permute_state, random, state_of
from tests.cases import CASES

NAMES = sorted(CASES)
SETTINGS = MergeSettings(ridge=1e-6, positions=64, rows=1000, propagate=0.7)
SEPARATE = MergeSettings(ridge=1e-6, positions=64, rows=1000, propagate=0.7, heads="separate")


def images(name: str, count: int = 96, seed: int = 5) -> Tensor:
    shape = CASES[name].shape
    return torch.randn((count, *shape[1:]), generator=torch.Generator().manual_seed(seed))


@cache
def traced(name: str) -> Symmetry:
    return pleas.trace(CASES[name].model(0), CASES[name].example())


@cache
def parents(name: str, count: int = 2) -> tuple[nn.Module, ...]:
    """Unrelated networks of one architecture."""
    return tuple(CASES[name].model(seed) for seed in range(count))


@cache
def permuted_copy(name: str, seed: int = 3) -> nn.Module:
    """The first of `parents` with its units in another order."""
    return shuffled(parents(name)[0], CASES[name].example(), seed)


def shuffled(model: nn.Module, example: Tensor, seed: int = 3) -> nn.Module:
    """A copy with its units in another order."""
    symmetry = pleas.trace(model, example, rewrites=())  # what the module's own tensors can express
    permutation = random(symmetry, torch.Generator().manual_seed(seed))
    state = permute_state(symmetry, state_of(symmetry.program, model), permutation)
    made = copy.deepcopy(model)
    made.load_state_dict({key: state.get(key, value) for key, value in made.state_dict().items()})
    return made


@cache
def relatives(name: str, count: int = 2, distance: float = 0.3) -> tuple[nn.Module, ...]:
    """The first of `parents`, and permuted copies of it whose weights then moved."""
    made = [parents(name)[0]]
    for seed in range(1, count):
        model = copy.deepcopy(permuted_copy(name, seed))
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.data += distance * p.data.std() * torch.randn(p.shape, generator=generator)
        made.append(model)
    return tuple(made)


@cache
def evidence_of(
    name: str, modules: tuple[nn.Module, ...], settings: MergeSettings = SETTINGS, count: int = 96
) -> Evidence:
    """What proxies say about networks of one case; kept, for many tests read the same."""
    made = Parents.of(modules, CASES[name].example(), settings, symmetry=traced(name))
    return pleas.gather(made, list(images(name, count).split(32)))


def run(
    name: str,
    *modules: nn.Module,
    settings: MergeSettings = SETTINGS,
    budget: float | None = None,
    apart: float | None = None,
) -> MergeResult:
    """Merge networks of one case."""
    evidence = evidence_of(name, modules, settings)
    return pleas.assemble(evidence, pleas.make_plan(evidence, budget=budget, apart=apart))


def outputs(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found = logits_of(module(x))
    assert found is not None
    return found


def difference(ours: Tensor, expected: Tensor) -> float:
    """Largest error relative to the scale of the expected output."""
    return float((ours - expected).abs().max() / expected.abs().max())
