"""One set of images in place of another, layer by layer, against the eigenvalue problem it stands for."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

import pleas
from pleas.coverage import LARGEST, cover, layer_problems
from tests.cases import CASES
from tests.merging import images, parents, traced
from tests.reference import covariance_by_loop, rows_by_unfold

SETTINGS = pleas.MergeSettings(rows=10**6, positions=10**6)  # every row there is


@cache
def evidence_of(
    count: int, seed: int, scale: float = 1.0, settings: pleas.MergeSettings = SETTINGS
) -> pleas.Evidence:
    made = pleas.Parents.of(
        parents("residual", 3), CASES["residual"].example(), settings, symmetry=traced("residual")
    )
    return pleas.gather(made, _batches(count, seed, scale))


def _batches(count: int, seed: int, scale: float = 1.0) -> list[Tensor]:
    return list((scale * images("residual", count, seed)).split(16))


def test_proxies_that_are_the_real_images_cover_them() -> None:
    evidence = evidence_of(32, 1)
    found = cover(evidence, evidence.inputs)
    assert [layer.layer for layer in found] == [layer.name for layer in evidence.parents.layers]
    for layer in found:
        assert layer.cosine == pytest.approx(1)
        assert layer.coverage[0] <= layer.coverage[1] <= layer.coverage[2] <= 1, "held under one by the ridge"
        assert layer.excess is None or layer.excess == pytest.approx(0, abs=1e-6)


def test_images_give_one_problem_however_they_are_handed_over() -> None:
    """A list says how many images there are, other collections do not: no reason to take other positions."""
    evidence = evidence_of(32, 1, settings=pleas.MergeSettings())
    found = cover(replace(evidence, inputs=dict(enumerate(evidence.inputs)).values()), evidence.inputs)
    assert all(layer.cosine == pytest.approx(1) for layer in found)


def test_faint_proxies_leave_real_energy_uncovered() -> None:
    covers = cover(evidence_of(32, 1, scale=0.1), _batches(32, 2))
    assert covers[0].coverage[2] > 10
    assert all(layer.excess is None or layer.excess >= -1e-6 for layer in covers)
    assert any(layer.excess is not None and layer.excess > 0.1 for layer in covers)
    assert min(layer.cosine for layer in covers) < 1


def test_too_few_real_rows_are_not_compared_with() -> None:
    evidence = evidence_of(32, 1)
    real = _batches(4, 2)
    problems = layer_problems(replace(evidence, inputs=real))
    found = {one.layer: one.excess for one in cover(evidence, real)}
    for layer in evidence.parents.layers:
        assert (found[layer.name] is None) == (problems[layer.name].count < 2 * layer.d_in)
    assert None in found.values()
    assert set(found.values()) != {None}


def test_the_first_layers_problem_is_its_rows_one_by_one() -> None:
    evidence = evidence_of(4, 1)
    layer = evidence.parents.layers[0]
    gram, mean = layer_problems(evidence)[layer.name].moments()
    rows = rows_by_unfold(torch.cat(_batches(4, 1)), (3, 3), 1, 1)
    rows = rows.unflatten(1, (9, 3)).double()
    expected_mean, expected = covariance_by_loop(rows.flatten(1))
    torch.testing.assert_close(mean, expected_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gram, expected, rtol=1e-5, atol=1e-5)


def test_coverage_is_the_generalised_eigenvalue_problem() -> None:
    evidence, real = evidence_of(32, 1), _batches(32, 2)
    proxies, known = layer_problems(evidence), layer_problems(replace(evidence, inputs=real))
    for found in cover(evidence, real):
        gram, _ = proxies[found.layer].moments()
        other, _ = known[found.layer].moments()
        ridge = SETTINGS.ridge * gram.diagonal().mean() * torch.eye(len(gram))
        values = scipy.linalg.eigh(other.numpy(), (gram + ridge).numpy(), eigvals_only=True)
        assert found.coverage[2] == pytest.approx(values[-1], rel=1e-6)
        assert found.coverage[0] == pytest.approx(np.median(values), rel=1e-6)


def test_large_grouped_and_unequal_layers_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = evidence_of(8, 1)
    sizes = {layer.name: layer.d_in for layer in evidence.parents.layers}
    assert max(sizes.values()) < LARGEST
    monkeypatch.setattr("pleas.coverage.LARGEST", 30)
    assert [one.layer for one in cover(evidence, evidence.inputs)] == [
        name for name, size in sizes.items() if size <= 30
    ]
    grouped = pleas.Parents.of(parents("grouped"), CASES["grouped"].example(), SETTINGS)
    found = pleas.gather(grouped, list(images("grouped", 16).split(8)))
    taken = {one.layer for one in cover(found, found.inputs)}
    assert taken <= {layer.name for layer in grouped.layers if layer.groups == 1}


def test_heads_of_unequal_size_have_no_common_problem() -> None:
    small = CASES["residual"].model(0)
    assert isinstance(small, torch.nn.Sequential)
    large = CASES["residual"].model(1)
    head = small[-1]  # type: ignore[index]
    assert isinstance(head, torch.nn.Sequential)
    head[-1] = torch.nn.Linear(8, 3)
    settings = replace(SETTINGS, heads="separate")
    both = pleas.Parents.of([small, large], CASES["residual"].example(), settings)
    evidence = pleas.gather(both, _batches(8, 1))
    head_layer = both.layers[-1].name
    assert head_layer not in {one.layer for one in cover(evidence, evidence.inputs)}
