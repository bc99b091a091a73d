"""The way back: a folder that `save` or `datafree merge` wrote, as a network. Nothing it brings is run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from datafree.artefact.description import CARD, CONFIG, FORMAT, WEIGHTS, Head
from datafree.artefact.rebuild import check_description, fill_own, rebuild
from datafree.artefact.timm_config import own_architecture
from datafree.cache.store import content_hash, read_safetensors
from datafree.errors import UsageError
from datafree.evaluation.evaluate import Labels
from datafree.images.preprocess import Preprocess
from datafree.references.registry import ARTEFACT_MARK


@dataclass(frozen=True)
class Artefact:
    """A loaded artefact: the network in evaluation mode and what its folder says of it."""

    folder: Path
    module: nn.Module
    heads: tuple[Head, ...]
    config: Mapping[str, Any]

    @property
    def preprocess(self) -> Preprocess:
        """How uint8 images (N, C, H, W) become the network's input. Raises UsageError if that was not
        saved.
        """
        found = self.config["input"]
        if found is None:
            raise UsageError(
                f"{self.folder} was saved without preprocessing: pass `preprocess=` to datafree.save"
            )
        height, width = found["size"]
        return Preprocess((height, width), tuple(found["mean"]), tuple(found["std"]), found["interpolation"])

    @property
    def labels(self) -> Labels:
        """ "shared" for one head, "separate" for one per parent, "union" for one over the classes of all."""
        if self.columns is not None:
            return "union"
        return "shared" if len(self.heads) == 1 else "separate"

    @property
    def columns(self) -> Mapping[str, list[int]] | None:
        """In a union, parent -> the output that each of its own outputs is; None otherwise."""
        return self.config.get("columns")


def load(folder: str | Path, *, model: nn.Module | Callable[[], nn.Module] | None = None) -> Artefact:
    """Rebuild the network that `save` or `datafree merge` wrote, in evaluation mode on the CPU.

    Nothing the folder brings is run: a network comes back from its graph, or as a class of timm or torchvision.
    model: the parents' own class (or a module of it, which is filled), where the network at 1.0x is wanted as that
        class: `load(folder, model=MyNet)`, `load(folder, model=lambda: MyNet(width=6))`. Where the folder knows
        its input, the class is compared with the saved graph on noise.

    Raises UsageError for a folder that is not an artefact, is incomplete, or does not have the content it was
    written with, and for a `model` that is not the class which was merged.
    """
    folder = Path(folder)
    config = _read_config(folder)
    state = _read_weights(folder / WEIGHTS)
    path = folder / CONFIG
    module = rebuild(config, state, path) if model is None else fill_own(model, config, state, path)
    heads = tuple(
        Head(head["parents"], head["outputs"], None if head["classes"] is None else tuple(head["classes"]))
        for head in config["heads"]
    )
    return Artefact(folder, module.eval(), heads, config)


def read_card(folder: Path) -> str:
    """The text of the model card. Raises UsageError where it is missing or not a text."""
    path = folder / CARD
    try:
        if not path.is_file():
            raise UsageError(f"{path} is missing or not a file: the artefact is incomplete")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}): the artefact is damaged") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        inside = sorted(item.parent.name for item in folder.glob(f"*/{CONFIG}"))
        if inside:
            raise UsageError(
                f"{folder} holds {len(inside)} artefacts ({', '.join(inside)}): name one, {folder / inside[0]}"
            )
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise UsageError(f"{folder} {what}: give a folder that datafree merge or datafree.save wrote")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): change its permissions") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({error}): the artefact is damaged") from error
    if not isinstance(config, dict) or ARTEFACT_MARK not in config:
        raise UsageError(
            f"{path} was not written by datafree: for other models use a model reference (timm:NAME, ...)"
        )
    if config.get("format") != FORMAT:
        raise UsageError(
            f"{folder} has format {config.get('format')!r:.40}, and this version of datafree reads format "
            f"{FORMAT}: it was written by datafree {config[ARTEFACT_MARK]!s:.40}, install that version"
        )
    config = own_architecture(config)
    check_description(config, path)
    return config


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        header, state = read_safetensors(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} cannot be read ({error}): the artefact is incomplete or damaged") from error
    if header.get("sha256") != content_hash(state):
        raise UsageError(f"{path} does not have the content it was written with: the artefact is damaged")
    return state
