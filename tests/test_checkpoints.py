"""Checkpoints that other people trained, where they are at hand (DATAFREE_DATA)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import pleas
from benchmarks.common import load_pair, proxies
from datafree.cache.store import CACHE_VARIABLE
from datafree.spec import DATA_VARIABLE
from pleas.symmetry import permute_state, random, state_of


@pytest.mark.slow
@pytest.mark.parametrize("apart", [0.0, 0.25])
def test_a_published_resnet_merged_with_its_permuted_copy_comes_back(
    apart: float, shared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Invariant 2 on real weights: logits within 1e-3 of their scale, and so no prediction changes."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setenv(DATA_VARIABLE, str(shared))
    pair = load_pair("cifar_resnet20", "cpu")
    a, settings = pair.parents.first.module, pleas.MergeSettings(ridge=1e-6)
    own = pleas.trace(a, pair.parents.example, rewrites=())  # what the module's own tensors can express
    state = permute_state(own, state_of(own.program, a), random(own, torch.Generator().manual_seed(1)))
    b = copy.deepcopy(a)
    b.load_state_dict({key: state.get(key, value) for key, value in b.state_dict().items()})
    images = pair.inputs(proxies(pair, "thumbnails", 0))
    evidence = pleas.gather(pair.networks(settings, [a, b]), images)
    merged = pleas.assemble(evidence, pleas.make_plan(evidence, apart=apart)).module
    x = next(images.merged())
    with torch.no_grad():
        expected, found = a(x), merged(x)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-3
    assert torch.equal(found.argmax(1), expected.argmax(1))
