"""The folder a merge leaves: it explains itself, and rebuilds the same network from its own files alone.

    model.safetensors   weights; the header holds recipe hash, versions and a hash of the content
    config.json         architecture, plan, input preprocessing, label names per head
    README.md           what it is, how it was made, how to load it
    and whatever the caller adds: recipe, metrics, report

A network of the parents' own class is rebuilt from its timm or torchvision name; any other one from its
graph, which is plain data, so that loading an artefact never runs code that came with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pleas
from datafree.artefact.description import (
    CARD,
    CONFIG,
    FORMAT,
    WEIGHTS,
    Description,
    head_sizes,
    make_heads,
    plan_table,
)
from datafree.artefact.timm_config import as_timm
from datafree.cache.store import content_hash, plain_tensors, write_safetensors
from datafree.errors import UsageError
from datafree.folders import new_folder
from datafree.images.preprocess import Preprocess
from datafree.references.registry import ARTEFACT_MARK, LIBRARIES
from datafree.report.pages import model_card
from pleas.network.module import build_network
from pleas.symmetry import state_of


def save(
    result: pleas.MergeResult,
    folder: str | Path,
    *,
    name: str = "merged",
    reference: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    preprocess: Preprocess | Mapping[str, Any] | None = None,
    classes: Sequence[Sequence[str] | None] | None = None,
    license: str | None = None,
    base_models: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:
    """Write a merged network as an artefact folder, whole or not at all, and return the folder.

    reference, arguments: what builds the parents' class, `torchvision:resnet18`; without it the graph is
    saved
    preprocess: how uint8 images become its input; or a mapping {"size": 32, "mean": [...], "std": [...]}
    classes: label names of each head
    license, base_models: for the model card, as the Hugging Face Hub names them
    Raises UsageError when the folder exists and `overwrite` is not given, RunError when it cannot be written.
    """
    if not isinstance(result, pleas.MergeResult):
        raise UsageError(
            f"save takes one pleas.MergeResult, not a {type(result).__name__}: of what datafree.merge gave, choose "
            "one, merged[1.0]"
        )
    if isinstance(preprocess, Mapping):
        preprocess = Preprocess.of(preprocess)
    heads = make_heads(head_sizes(result), result.parents.names, classes)
    description = Description(
        name, heads, reference, arguments or {}, preprocess, license=license, base_models=tuple(base_models)
    )
    _check_plain(description.arguments)
    module = portable(result, reference)
    with new_folder(Path(folder), overwrite=overwrite) as building:
        write_model(building, module, result, description)
        (building / CARD).write_text(model_card(description, result), encoding="utf-8")
    return Path(folder)


def _check_plain(arguments: Mapping[str, Any]) -> None:
    try:
        json.dumps(dict(arguments))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"arguments {dict(arguments)} cannot be written as JSON ({error}): give plain numbers, texts and lists"
        ) from error


def portable(result: pleas.MergeResult, reference: str | None) -> nn.Module:
    """The merged module exactly as `load` will rebuild it, in a form that can be rebuilt anywhere.

    A module of the parents' own class stays as it is where timm or torchvision can build it again; one that
    came from a Python file or from a library call becomes the graph it was traced to, because loading never runs
    code that a folder names: `load(folder, model=MyClass)` brings the class back.
    """
    module = result.module
    config = pleas.program_config(module)
    if config is None and reference is not None and reference.startswith(LIBRARIES):
        return module
    if config is None:
        config = pleas.program_config(_as_graph(result))
        assert config is not None
        state = state_of(result.parents.symmetry.program, module)
    else:
        state = module.state_dict()
    # Copied into fresh memory: a stride that is free to choose (a dimension of size 1) would otherwise
    # differ from that of a loaded network, and with it the order of sums.
    rebuilt = pleas.module_from_config(config)
    rebuilt.load_state_dict(state)
    return rebuilt.eval()


def _as_graph(result: pleas.MergeResult) -> pleas.MergedNetwork:
    program = result.parents.symmetry.program
    trainable = {*program.parameters, *program.added}
    state = state_of(program, result.module)
    tensors = {key: (value, key in trainable) for key, value in state.items()}
    return build_network(program.graph, {}, tensors, head_sizes(result), program.notes)


def write_model(
    folder: Path, module: nn.Module, result: pleas.MergeResult, description: Description
) -> dict[str, Any]:
    """Write weights and `config.json` of `module` (as `portable` gave it) into `folder`; returns the
    config.
    """
    network = pleas.program_config(module)
    reference, timm = description.reference or "", {}
    if network is None and reference.startswith("timm:"):
        timm = as_timm(module, reference, description.arguments, description.input, description.heads)
    config = {
        ARTEFACT_MARK: version("datafree"),
        "format": FORMAT,
        "name": description.name,
        "recipe": description.recipe,
        "architecture": {"reference": description.reference, "arguments": dict(description.arguments)},
        "input": None if description.input is None else description.input.to_dict(),
        "heads": [asdict(head) for head in description.heads],
        "flops": {"merged": result.flops, "parent": result.parent_flops, "ratio": result.ratio},
        "parameters": result.parameters,
        "plan": plan_table(result.parents, result.plan),
        **description.details,
        "network": network,
        **timm,
    }
    tensors = plain_tensors(module.state_dict())
    header = {
        "format": "pt",
        "datafree": version("datafree"),
        "torch": torch.__version__,
        "recipe": description.recipe or "",
        "sha256": content_hash(tensors),
    }
    write_safetensors(folder / WEIGHTS, tensors, header)
    (folder / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return config
