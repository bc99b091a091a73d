"""The quickstart's experts: deterministic, cached, restored; their accuracy is checked in a slow test."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import pleas
from datafree import digits
from datafree.cache.store import CACHE_VARIABLE
from datafree.errors import RunError, UsageError
from datafree.evaluation.evaluate import TaskSpec, evaluate, load_task, merged_columns, parent_columns
from datafree.models.parent import Parent, ParentSpec, load_parent

QUICK = dataclasses.replace(digits.EXPERTS["low"], epochs=1)


def parent(name: str, base: Path, *, probe: bool = False) -> Parent:
    outputs = len(digits.EXPERTS[name].digits)
    keys = {
        "model": "python:datafree.digits:digits_resnet",
        "arguments": {"num_classes": outputs},
        "weights": f"digits:{name}",
        "preprocess": {"size": 8, "mean": (0.5,), "std": (0.4,)},
    }
    return load_parent(ParentSpec.model_validate(keys), "a", base, probe=probe)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Experts of one epoch, and an empty cache; returns the cache."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    for name, expert in digits.EXPERTS.items():
        monkeypatch.setitem(digits.EXPERTS, name, dataclasses.replace(expert, epochs=1))
    return tmp_path


def test_training_is_deterministic_and_leaves_no_trace() -> None:
    torch.manual_seed(3)
    expected, threads = torch.rand(2), torch.get_num_threads()
    torch.manual_seed(3)
    first = digits.trained(QUICK).state_dict()
    assert torch.equal(torch.rand(2), expected)
    assert torch.get_num_threads() == threads
    second = digits.trained(QUICK).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_expert_is_trained_once_and_then_cached(quick: Path) -> None:
    told: list[tuple[str, int, int]] = []
    keys = {
        "model": "python:datafree.digits:digits_resnet",
        "arguments": {"num_classes": 5},
        "weights": "digits:high",
    }
    spec = ParentSpec.model_validate({**keys, "preprocess": {"size": 8, "mean": (0.5,), "std": (0.4,)}})
    first = load_parent(spec, "a", quick, progress=lambda *step: told.append(step))
    assert told == [("training the expert digits:high", 1, 1)]
    assert first.weights is not None
    assert first.weights.is_relative_to(quick)
    assert first.notes[0] == f"digits:high: trained just now and cached at {first.weights}"
    written = first.weights.stat().st_mtime_ns
    second = load_parent(spec, "b", quick)
    assert second.notes[0] == f"digits:high: cached at {first.weights}"
    assert (second.fingerprint, first.weights.stat().st_mtime_ns) == (first.fingerprint, written)
    assert [path.name for path in first.weights.parent.iterdir()] == [first.weights.name]


def test_a_probe_trains_nothing_and_says_so(quick: Path) -> None:
    probed = parent("upright", quick, probe=True)
    assert "digits:upright is not trained yet: a merge trains it first" in probed.notes[0]
    assert not list(quick.iterdir())
    state = probed.module.state_dict()
    assert not torch.equal(state["bn1.running_var"], torch.ones(32))  # as an inversion demands of a parent
    assert probed.fingerprint != parent("upright", quick).fingerprint


def test_settings_decide_where_the_weights_lie(quick: Path) -> None:
    paths = {expert.path() for expert in digits.EXPERTS.values()} | {QUICK.path()}
    assert len(paths) == 4  # QUICK is the `low` of this test
    assert dataclasses.replace(QUICK, seed=99).path() not in paths


def test_an_unknown_expert_is_named_with_the_known_ones() -> None:
    with pytest.raises(
        UsageError, match=r"there are upright, rotated, low, high; did you mean 'digits:upright'\?"
    ):
        digits.expert("uprigth")


def test_damaged_weights_are_trained_again_and_said(quick: Path) -> None:
    first = parent("low", quick)
    assert first.weights is not None
    content = bytearray(first.weights.read_bytes())
    content[-1] ^= 1
    first.weights.write_bytes(content)
    again = parent("low", quick)
    assert "the cached weights were damaged" in again.notes[0]
    assert "trained again and cached" in again.notes[0]
    assert again.fingerprint == first.fingerprint == parent("low", quick).fingerprint


def test_an_unwritable_cache_says_what_to_do(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = quick / "file"
    blocked.write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(blocked))
    with pytest.raises(RunError, match=r"cannot be written .* free some space, or set DATAFREE_CACHE"):
        digits.weights(QUICK)


@pytest.mark.slow
def test_experts_know_their_own_domain_and_not_the_other(tmp_path: Path) -> None:
    tasks = [
        load_task(
            TaskSpec.model_validate({"name": domain, "images": {"digits": {"domain": domain}}}), tmp_path
        )
        for domain in ("upright", "rotated")
    ]
    for own, name in enumerate(("upright", "rotated")):
        expert = parent(name, tmp_path)
        scores = evaluate(
            expert.module, tasks, expert.preprocess, parent_columns("shared", "a", {"a": 10, "b": 10})
        ).tasks
        assert scores[own].accuracy > 0.95
        assert scores[1 - own].accuracy < 0.6


@pytest.mark.slow
def test_the_ensemble_of_the_experts_knows_both_domains(tmp_path: Path) -> None:
    tasks = [
        load_task(
            TaskSpec.model_validate({"name": domain, "images": {"digits": {"domain": domain}}}), tmp_path
        )
        for domain in ("upright", "rotated")
    ]
    a, b = parent("upright", tmp_path), parent("rotated", tmp_path)
    columns = merged_columns("shared", {"a": 10, "b": 10})
    both = evaluate(pleas.Ensemble(a.module, b.module), tasks, a.preprocess, columns)
    assert min(score.accuracy for score in both.tasks) > 0.9
