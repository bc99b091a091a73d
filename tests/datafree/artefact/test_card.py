"""The model card: read by the Hub's own library, free of this machine's paths, and with this folder's row marked."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import datafree
from datafree.artefact import export
from datafree.artefact.card_data import reference_name, without_paths
from datafree.artefact.description import Description, make_heads
from datafree.errors import RunError, UsageError
from datafree.evaluation.results import Results
from datafree.report.pages import model_card
from tests.datafree.artefact.test_safe_loading import INPUT, merged
from tests.datafree.report.test_pages import _results

PARENT = {"reference": "python:/home/me/secret/net.py:net", "weights": "a.pt", "fingerprint": "ab" * 32}


def card(results: Results | None = None, **keys: Any) -> Any:
    details = {"parents": {"a": PARENT, "b": PARENT}, "point": {"kind": "budget", "value": 1.25}}
    keys = {"reference": "python:/home/me/secret/net.py:net", "details": details} | keys
    description = Description("tiny, budget 1.25", make_heads([5], ["a", "b"]), **keys)
    return ModelCard(model_card(description, merged(), results, [{"kind": "images", "count": 64}]))


def test_the_hubs_library_reads_the_block() -> None:
    found = card(_results()).data
    assert found.to_dict() | {"model-index": None} == {
        "license": "unknown",
        "library_name": "datafree",
        "pipeline_tag": "image-classification",
        "tags": ["datafree", "merge", "model-merging", "image-classification"],
        "metrics": ["accuracy"],
        "model-index": None,
    }
    assert found.eval_results is not None
    assert [(one.dataset_name, one.metric_value) for one in found.eval_results] == [
        ("upright", 0.8),
        ("rotated", 0.9),
    ]
    assert found.model_name == "tiny, budget 1.25"
    assert card().data.eval_results is None


def test_licence_and_parents_are_those_that_were_said() -> None:
    found = card(license="apache-2.0", base_models=("me/a", "me/b"))
    assert (found.data.license, found.data.base_model) == ("apache-2.0", ["me/a", "me/b"])
    assert found.data.to_dict()["base_model_relation"] == "merge"
    assert "- license: apache-2.0\n" in found.text
    assert (
        "- license: unknown, not recorded: what the licenses of all parents' weights allow holds"
        in card().text
    )


def test_the_row_of_this_folder_stands_out() -> None:
    lines = [line for line in card(_results()).text.splitlines() if line.startswith("| **")]
    assert lines == [
        "| **merged, budget 1.25** | **80.0** | **90.0** | **85.0** | **0.250** | **101 M** | **1.232** | **340 k** |"
    ]
    assert "The row in bold is the network in this folder." in card(_results()).text


def test_no_path_of_this_machine_is_published() -> None:
    notes = (
        "rebuilt /root/.cache/datafree/x.safetensors: it is damaged",
        "weights of local-dir:../mine/net, 50/50 a/b",
    )
    text = str(card(_results(notes=notes)))
    assert "/home" not in text
    assert "/root" not in text
    assert "`python:net.py:net`" in text
    assert "- rebuilt x.safetensors: it is damaged" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a /home/me/x y.pt b", "a x y.pt b"),
        ("see ~/x/y.pt: and ../z.pt", "see y.pt: and z.pt"),
        (r"C:\Users\me\net.pt", "net.pt"),
        ("50/50, a/b and 3.5 / 7", "50/50, a/b and 3.5 / 7"),
        ("'/tmp/a.pt'", "'a.pt'"),
    ],
)
def test_paths_are_shortened_to_names(text: str, expected: str) -> None:
    assert without_paths(text) == expected


def test_references_are_named_without_folders() -> None:
    assert reference_name("python:../x/net.py:net") == "python:net.py:net"
    assert reference_name("local-dir:/home/me/out") == "local-dir:out"
    assert reference_name("timm:resnet18.a1_in1k") == "timm:resnet18.a1_in1k"
    assert reference_name("python:pkg.mod:net") == "python:pkg.mod:net"


def test_a_saved_folder_has_such_a_card_and_ordinary_permissions(tmp_path: Path) -> None:
    for mask in (0o022, 0o077):
        before = os.umask(mask)
        try:
            folder = datafree.save(merged(), tmp_path / f"{mask}", preprocess=INPUT, license="mit")
        finally:
            os.umask(before)
        assert folder.stat().st_mode & 0o777 == 0o777 & ~mask
        for path in folder.iterdir():
            assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path
        assert ModelCard.load(folder / "README.md").data.to_dict()["license"] == "mit"
    with pytest.raises(UsageError, match="cannot be written as JSON"):
        datafree.save(merged(), tmp_path / "odd", arguments={"act": torch.relu})


def test_exports_have_a_named_batch_and_the_networks_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = pytest.importorskip("onnx")
    module = merged(0.5).module
    export.write_exports(tmp_path, module, torch.zeros(2, 3, 8, 8))
    graph = onnx.load(tmp_path / "model.onnx").graph
    names = {
        value.name: value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output)
    }
    assert names == {"images": "batch", "logits": "batch"}
    monkeypatch.setattr(export, "_onnx_runner", lambda path: lambda images: torch.zeros(len(images), 5))
    with pytest.raises(
        RunError, match=re.escape("model.onnx, read again, gives other numbers than the network (100.0%")
    ):
        export.write_exports(tmp_path, module, torch.zeros(2, 3, 8, 8))
