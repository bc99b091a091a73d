"""Artefact folders: what is in them, that they come back bit for bit in another process, and damage."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torchvision import models

import datafree
import pleas
from datafree.artefact.export import PROGRAM, write_exports
from datafree.errors import UsageError
from datafree.images.preprocess import Preprocess
from datafree.references.registry import build_model
from tests.cases import CASES, randomise
from tests.pleas.test_transformers import MODELS

INPUT = Preprocess((16, 16), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@cache
def _merge(name: str, apart: float = 0.5) -> pleas.MergeResult:
    case = CASES[name]
    a, b = case.model(1), case.model(2)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(16, *case.shape[1:], generator=generator) for _ in range(4)]
    return pleas.merge(a, b, batches, apart=apart, settings=pleas.MergeSettings(min_rows=0.0))


def _images(name: str) -> torch.Tensor:
    return torch.randn(5, *CASES[name].shape[1:], generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("apart", [0.0, 0.5])
def test_saved_and_loaded_networks_agree_bit_for_bit(name: str, apart: float, tmp_path: Path) -> None:
    result = _merge(name, apart=apart)
    loaded = datafree.load(datafree.save(result, tmp_path / "out")).module
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(_images(name)), result.module(_images(name)))


@cache
def _merged_transformer(name: str) -> tuple[pleas.MergeResult, torch.Tensor]:
    build, size = MODELS[name]
    a, b = (randomise(build().eval(), torch.Generator().manual_seed(seed)) for seed in (1, 2))
    images = torch.randn(64, 3, size, size, generator=torch.Generator().manual_seed(0))
    settings = pleas.MergeSettings(min_rows=0.0)
    return pleas.merge(a, b, list(images.split(16)), apart=0.5, settings=settings), images[:5]


QUICK = {"vit", "swin"}  # of the transformers, merged for other tests as well


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(MODELS)]
)
def test_widened_transformers_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    result, images = _merged_transformer(name)
    assert result.ratio > 1.0
    loaded = datafree.load(datafree.save(result, tmp_path / "out")).module
    with torch.no_grad():
        assert torch.equal(loaded(images), result.module(images))


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_widened_transformers_are_exported(name: str, tmp_path: Path) -> None:
    result, images = _merged_transformer(name)
    write_exports(tmp_path, result.module, images[:2])
    program = torch.export.load(tmp_path / PROGRAM).module()
    with torch.no_grad():
        assert torch.allclose(program(images), result.module(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["residual", "vit"])
def test_another_process_needs_nothing_but_the_folder(name: str, tmp_path: Path) -> None:
    result, images = _merged_transformer(name) if name == "vit" else (_merge(name), _images(name))
    folder = datafree.save(result, tmp_path / "out", preprocess=INPUT)
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch, datafree; torch.set_num_threads(1)\n"
        "artefact = datafree.load(sys.argv[1])\n"
        "assert artefact.preprocess.size == (16, 16)\n"
        "with torch.no_grad(): torch.save(artefact.module(torch.load(sys.argv[2])), sys.argv[3])"
    )
    arguments = [folder, tmp_path / "images.pt", tmp_path / "outputs.pt"]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, cwd=tmp_path)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "outputs.pt"), result.module(images))


def test_the_header_and_the_config_say_what_it_is(tmp_path: Path) -> None:
    result = _merge("residual")
    folder = datafree.save(result, tmp_path / "out", name="mine", preprocess=INPUT, classes=[[*"abcde"]])
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        header = file.metadata()
    assert header["datafree"] == datafree.__version__
    assert header["torch"] == torch.__version__
    config = json.loads((folder / "config.json").read_text())
    assert config["heads"] == [{"parents": "a and b", "outputs": 5, "classes": [*"abcde"]}]
    assert config["flops"]["merged"] == result.flops
    assert sum(row["apart"] > 0 for row in config["plan"]) > 0
    card = (folder / "README.md").read_text()
    assert "# mine" in card
    assert "datafree.load" in card
    assert "a, b, c" in card
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_the_same_merge_is_the_same_bytes(tmp_path: Path) -> None:
    for place in ("one", "two"):
        datafree.save(_merge.__wrapped__("residual"), tmp_path / place)  # made twice
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_published_architecture_comes_back_as_its_own_class(tmp_path: Path) -> None:
    reference, arguments = "torchvision:squeezenet1_1", {"num_classes": 4}
    a, b = (
        randomise(build_model(reference, arguments, tmp_path), torch.Generator().manual_seed(seed))
        for seed in (1, 2)
    )
    batches = [torch.randn(4, 3, 64, 64)]
    result = pleas.merge(a, b, batches, apart=0.0, settings=pleas.MergeSettings(min_rows=0.0))
    folder = datafree.save(result, tmp_path / "out", reference=reference, arguments=arguments)
    loaded = datafree.load(folder).module
    assert isinstance(loaded, models.SqueezeNet)
    with torch.no_grad():
        assert torch.equal(loaded(batches[0]), result.module(batches[0]))


def test_without_preprocessing_the_artefact_says_so(tmp_path: Path) -> None:
    artefact = datafree.load(datafree.save(_merge("residual"), tmp_path / "out"))
    with pytest.raises(UsageError) as caught:
        _ = artefact.preprocess
    assert str(caught.value) == (
        f"{tmp_path / 'out'} was saved without preprocessing: pass `preprocess=` to datafree.save"
    )


def test_label_names_must_fit(tmp_path: Path) -> None:
    result = _merge("residual")
    with pytest.raises(UsageError, match="has 5 outputs, but 2 label names were given"):
        datafree.save(result, tmp_path / "out", classes=[["a", "b"]])
    with pytest.raises(UsageError, match="classes has 2 entries for 1 heads: give one per head"):
        datafree.save(result, tmp_path / "out", classes=[None, None])
    assert not (tmp_path / "out").exists()


def _saved(folder: Path) -> Path:
    return datafree.save(_merge("residual"), folder)


def _refused(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        datafree.load(folder)
    return str(caught.value)


def test_folders_that_are_no_artefact(tmp_path: Path) -> None:
    assert _refused(tmp_path / "absent") == (
        f"{tmp_path / 'absent'} is not a folder: give a folder that datafree merge or datafree.save wrote"
    )
    assert _refused(tmp_path) == (
        f"{tmp_path} has no config.json: give a folder that datafree merge or datafree.save wrote"
    )
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    assert "was not written by datafree: for other models use a model reference" in _refused(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in _refused(tmp_path)


def test_a_folder_of_several_artefacts_names_them(tmp_path: Path) -> None:
    for name in ("budget-1", "budget-1.25"):
        _saved(tmp_path / name)
    assert _refused(tmp_path) == (
        f"{tmp_path} holds 2 artefacts (budget-1, budget-1.25): name one, {tmp_path / 'budget-1'}"
    )


def test_damage_is_noticed(tmp_path: Path) -> None:
    weights = _saved(tmp_path / "out") / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "does not have the content it was written with: the artefact is damaged" in _refused(
        tmp_path / "out"
    )
    weights.write_bytes(whole[:100])
    assert "the artefact is incomplete or damaged" in _refused(tmp_path / "out")
    weights.unlink()
    assert "the artefact is incomplete or damaged" in _refused(tmp_path / "out")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path / "out") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99, "datafree": "9.9"}))
    assert "has format 99, and this version of datafree reads format 1" in _refused(tmp_path / "out")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    _saved(tmp_path / "out")
    datafree.save(_merge("residual", apart=0.25), tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "out" / "model.safetensors")
    assert "model.safetensors does not fit the network in config.json" in _refused(tmp_path / "out")
