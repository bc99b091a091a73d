"""Networks small enough to merge by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

import pleas
from pleas import Evidence, MergeSettings, Parents
from pleas.comparators import Case, Comparator
from pleas.symmetry import identity

SETTINGS = MergeSettings(min_rows=0.0)


def linear(
    *weights: Sequence[Sequence[float]], biases: Sequence[Sequence[float]] | None = None
) -> nn.Sequential:
    """Linear maps with ReLU between them."""
    parts: list[nn.Module] = []
    for number, weight in enumerate(weights):
        matrix = torch.tensor(weight)
        part = nn.Linear(matrix.shape[1], matrix.shape[0], bias=biases is not None)
        part.weight.data = matrix
        if biases is not None:
            part.bias.data = torch.tensor(biases[number])
        parts += [part, nn.ReLU()]
    return nn.Sequential(*parts[:-1]).eval()


def normed(weight: Sequence[Sequence[float]], scale: Sequence[float], mean: Sequence[float]) -> nn.Module:
    """A linear map, a batch norm, ReLU, and a head that adds the units up."""
    matrix = torch.tensor(weight)
    norm = nn.BatchNorm1d(len(matrix))
    norm.weight.data, norm.running_mean = torch.tensor(scale), torch.tensor(mean)
    first, head = nn.Linear(matrix.shape[1], len(matrix), bias=False), nn.Linear(len(matrix), 2, bias=False)
    first.weight.data, head.weight.data = matrix, torch.ones(2, len(matrix))
    return nn.Sequential(first, norm, nn.ReLU(), head).eval()


def gathered(
    modules: Sequence[nn.Module], batches: Sequence[Tensor], settings: MergeSettings = SETTINGS
) -> Evidence:
    return pleas.gather(Parents.of(modules, batches[0][:2], settings), list(batches))


def unmatched(evidence: Evidence) -> Evidence:
    """The same, units as they come."""
    still = identity(evidence.parents.symmetry)
    return replace(evidence, alignments=(still,) * evidence.parents.count)


def merged(method: Comparator, evidence: Evidence, seed: int = 0) -> nn.Module:
    """The method's network; nothing that it was given has changed."""
    before = [{k: v.clone() for k, v in state.items()} for state in evidence.parents.states]
    random = torch.get_rng_state()
    found = method(Case(evidence, evidence.inputs, seed=seed))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    for state, old in zip(evidence.parents.states, before, strict=True):
        assert all(torch.equal(state[name], value) for name, value in old.items())
    assert isinstance(found, nn.Module)
    assert not found.training
    return found


def state(module: nn.Module) -> Mapping[str, Tensor]:
    return module.state_dict()
