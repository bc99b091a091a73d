"""Experts that the benchmark trains: their settings decide their weights, and they are trained once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.pairs.experts import Expert, moved, weights
from datafree.cache.store import CACHE_VARIABLE
from datafree.spec import DATA_VARIABLE

TOY = Expert("toy", "x_train", seed=1, classes=("x", "y"), side=8, epochs=1, batch=8)


@pytest.fixture(autouse=True)
def _toy_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen images of two classes, and a cache of their own."""
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "data" / "toy.npz", x_train=pixels, y_train=np.arange(16) % 2)


def test_an_expert_is_trained_once(capsys: pytest.CaptureFixture[str]) -> None:
    first = weights(TOY)
    assert "trained an expert on toy x_train, seed 1" in capsys.readouterr().out
    assert weights(TOY) == first
    assert capsys.readouterr().out == ""


def test_a_damaged_expert_is_trained_again_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    path = weights(TOY)
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert weights(TOY).read_bytes() == whole
    assert f"an expert is trained again: {path} cannot be read" in capsys.readouterr().out


def test_settings_decide_the_weights_and_random_state_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    first = weights(TOY).read_bytes()
    assert torch.equal(torch.random.get_rng_state(), before)
    weights(TOY).unlink()
    torch.manual_seed(5)
    assert weights(TOY).read_bytes() == first
    assert weights(replace(TOY, seed=2)).read_bytes() != first


def test_an_expert_with_a_base_starts_from_its_body() -> None:
    tuned = replace(TOY, base=TOY, seed=2, rate=1e-12)
    base, child = TOY("base").module.state_dict(), tuned("child").module.state_dict()
    same = {name for name, value in base.items() if torch.allclose(value, child[name])}
    parameters = {name for name, value in base.items() if name.endswith(("weight", "bias"))}
    assert parameters - same == {"linear.weight", "linear.bias"}


def test_a_parent_is_frozen_and_takes_the_experts_input() -> None:
    parent = TOY("toy")
    assert (parent.name, parent.outputs, parent.preprocess.shape) == ("toy", 2, (3, 8, 8))
    assert not parent.module.training
    assert not any(parameter.requires_grad for parameter in parent.module.parameters())


def test_moved_images_are_shifts_of_themselves_with_the_edge_repeated() -> None:
    batch = torch.arange(4.0).repeat(64, 1, 4, 1)  # every row 0, 1, 2, 3
    assert torch.equal(moved(batch, 0, False), batch)
    found = {tuple(image[0, 0].tolist()) for image in moved(batch, 1, False)}
    assert found == {(0, 0, 1, 2), (0, 1, 2, 3), (1, 2, 3, 3)}
    mirrored = {tuple(image[0, 0].tolist()) for image in moved(batch, 0, True)}
    assert mirrored == {(0, 1, 2, 3), (3, 2, 1, 0)}
