"""What is saved of timm's own networks is read by timm, from a folder and from the Hub's cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import datafree
import pleas
from datafree.errors import UsageError
from datafree.models.parent import ParentSpec, load_parent
from datafree.references.registry import build

NAME, SIZE = "test_resnet", 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parents = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parents.append(timm.create_model(NAME, num_classes=3))
    inputs = torch.randn(24, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    settings = pleas.MergeSettings(propagate=0.0, min_rows=0.0)
    merged = datafree.merge(parents, inputs, settings=settings)
    return datafree.save(
        merged.only,
        tmp_path_factory.mktemp("timm") / "out",
        reference=f"timm:{NAME}",
        arguments={"num_classes": 3},
        preprocess=datafree.Preprocess((SIZE, SIZE), (0.5,) * 3, (0.2,) * 3),
        classes=[["cat", "dog", "cow"]],
    )


def outputs(module: nn.Module) -> torch.Tensor:
    x = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return module.eval()(x)


def test_timm_and_datafree_load_one_folder(folder: Path) -> None:
    ours = datafree.load(folder)
    theirs: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(outputs(theirs), outputs(ours.module))
    config = theirs.pretrained_cfg
    assert (config["mean"], tuple(config["input_size"])) == ([0.5] * 3, (3, SIZE, SIZE))
    assert config["label_names"] == ["cat", "dog", "cow"]
    assert ours.config["architecture"] == {"reference": f"timm:{NAME}", "arguments": {"num_classes": 3}}


def test_the_hub_is_read_from_its_cache_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[dict[str, Any]] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        if name != "me/merged":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no such snapshot")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    parent = load_parent(ParentSpec(model="hf-hub:me/merged@abc"), "a", tmp_path)
    assert torch.equal(outputs(parent.module), outputs(datafree.load(folder).module))
    assert parent.classes == ("cat", "dog", "cow")
    assert (asked[0]["revision"], asked[0]["local_files_only"]) == ("abc", True)
    with pytest.raises(
        UsageError, match=r"hf-hub:me/other: is not in the local cache of the Hub .*allow_download"
    ):
        build("hf-hub:me/other", {}, tmp_path)
    allowed = ParentSpec(model="hf-hub:me/merged", pretrained=True, allow_download=True)
    load_parent(allowed, "a", tmp_path)
    assert asked[-1]["local_files_only"] is False
    monkeypatch.setenv("DATAFREE_OFFLINE", "1")
    with pytest.raises(UsageError, match="--offline forbids"):
        load_parent(allowed, "a", tmp_path)
    with pytest.raises(UsageError, match="write hf-hub:OWNER/NAME"):
        build("hf-hub:merged", {}, tmp_path)
