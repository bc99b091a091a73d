"""Every recipe in `recipes/` passes `check`; the ImageNet one also runs, with random weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from torchvision import models

from datafree.cli import main
from datafree.recipe.file import load_recipe
from datafree.references.registry import build_model
from datafree.spec import DATA_VARIABLE

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
NEEDS_DATA = {path.name for path in RECIPES.glob("*.yaml") if DATA_VARIABLE in path.read_text()}
IMAGENET, DIFFUSION = "imagenet_resnet50.yaml", "diffusion.yaml"
VARIANTS = [  # the other keys that recipes suggest in comments
    (path.name, setting)
    for path in sorted(RECIPES.glob("*.yaml"))
    for setting in re.findall(r"^# .*--set '(.+)'$", path.read_text(), re.MULTILINE)
]


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def photographs(folder: Path, count: int, classes: tuple[str, ...] = ("",)) -> None:
    """Smooth coloured pictures of unequal sizes: enough for shapes and statistics."""
    generator = np.random.default_rng([len(classes), count])  # other pictures in every folder
    for index in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        place = folder / classes[index % len(classes)]
        place.mkdir(parents=True, exist_ok=True)
        coarse.resize((240 + index % 3, 250), Image.Resampling.BICUBIC).save(place / f"{index:03}.jpg")


@pytest.fixture
def imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the ImageNet recipe asks its user for: two ResNet-50 files and two folders of pictures."""
    for name, seed in (("A", 0), ("B", 1)):
        torch.manual_seed(seed)
        torch.save(models.resnet50().state_dict(), tmp_path / f"{name}.pth")
        monkeypatch.setenv(f"RESNET50_{name}", str(tmp_path / f"{name}.pth"))
    photographs(tmp_path / "photos", 780)
    photographs(tmp_path / "val", 4, ("n01440764", "n01443537"))
    monkeypatch.setenv("PROXY_IMAGES", str(tmp_path / "photos"))
    monkeypatch.setenv("IMAGENET_VAL", str(tmp_path / "val"))
    return tmp_path


@pytest.fixture
def ddpm_pair(tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `python -m benchmarks.ddpm_pair` would leave, untrained."""
    network = "python:benchmarks/ddpm_pair.py:small_net"
    for seed, name in enumerate(("digits", "garments")):
        torch.manual_seed(seed)
        model = build_model(network, {}, project)
        model.train()(torch.randn(32, 1, 28, 28))
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (600, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "garments.npz", x_test=pixels[:20], y_test=np.arange(20) % 10)
    np.savez(tmp_path / "real.npz", x=pixels[20:])
    monkeypatch.setenv("DDPM_PAIR", str(tmp_path))
    return tmp_path


def test_the_scenarios_are_there() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} >= {
        "quickstart",
        "disjoint_labels",
        "cifar_halves",
        "cifar_resnet20",
        "cifar_resnet56",
        "imagenet_resnet50",
        "diffusion",
    }


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_well_formed_and_survives_being_resolved(path: Path, tmp_path: Path) -> None:
    first = load_recipe(path)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(first.resolved(tmp_path))
    assert load_recipe(resolved).recipe.fingerprint() == first.recipe.fingerprint()


@pytest.mark.parametrize(
    "name", sorted({path.name for path in RECIPES.glob("*.yaml")} - {IMAGENET, DIFFUSION})
)
def test_every_recipe_passes_check(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in NEEDS_DATA:
        monkeypatch.setenv(DATA_VARIABLE, str(request.getfixturevalue("shared")))
    assert "is ready" in invoke("check", str(RECIPES / name))


@pytest.mark.parametrize(("name", "setting"), VARIANTS)
def test_every_suggested_setting_passes_check(
    name: str, setting: str, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(shared))
    assert "is ready" in invoke("check", str(RECIPES / name), "--set", setting)


def test_recipes_suggest_every_other_source() -> None:
    text = " ".join(setting for _, setting in VARIANTS)
    assert {kind for kind in ("images", "procedural", "noise", "inversion") if f"kind: {kind}" in text} == {
        "images", "procedural", "noise", "inversion",
    }  # fmt: skip


def test_the_diffusion_recipe_passes_check(
    ddpm_pair: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(shared))
    assert "is ready" in invoke("check", str(RECIPES / DIFFUSION))


@pytest.mark.slow
def test_the_imagenet_recipe_passes_check(imagenet: Path) -> None:
    assert "is ready" in invoke("check", str(RECIPES / IMAGENET))


def test_the_imagenet_recipe_says_which_variable_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESNET50_A", raising=False)
    result = CliRunner().invoke(main, ["check", str(RECIPES / IMAGENET)])
    assert result.exit_code == 2
    assert "the environment variable 'RESNET50_A' in '${RESNET50_A}' is not set" in result.output


@pytest.mark.slow
def test_the_imagenet_recipe_runs_with_random_weights(imagenet: Path, tmp_path: Path) -> None:
    changes = (
        "proxy.count=24",
        "merge.budgets=[1.0]",
        "merge.positions=4",
        "merge.min_rows=0",
        "merge.batch=8",
    )
    settings = [part for change in changes for part in ("--set", change)]
    out = tmp_path / "out"
    invoke("merge", str(RECIPES / IMAGENET), "--out", str(out), "--device", "cpu", *settings)
    assert json.loads((out / "metrics.json").read_text())
