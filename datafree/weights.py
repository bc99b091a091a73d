"""Checkpoint files -> state dicts -> models, without ever running code that a file carries."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from datafree.errors import UsageError

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")  # left by DataParallel and by torch.compile
_LISTED = 6


def load_weights(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """State dict in a checkpoint file, and one sentence for everything that was unwrapped or stripped on the
    way.

    Reads `.safetensors`, and `.pt`, `.pth`, `.th`, `.bin`, `.ckpt` with `weights_only=True`. Raises
    UsageError for a file that is missing, truncated, not a checkpoint, or that holds pickled Python objects;
    those are never executed.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"weights file {path} {what}: give a .safetensors, .pt, .pth or .th file")
    if path.suffix == ".safetensors":
        return _unwrap(_read_safetensors(path), path)
    if path.suffix in TORCH_SUFFIXES:
        return _unwrap(_read_torch(path), path)
    raise UsageError(
        f"weights file {path}: unknown ending {path.suffix!r}; known are .safetensors, "
        f"{', '.join(TORCH_SUFFIXES)}"
    )


def load_into(model: nn.Module, state: Mapping[str, Tensor], source: str) -> tuple[str, ...]:
    """Copy `state` into `model`, every key or none; returns notes.

    Raises UsageError listing keys that are missing, unexpected or of another shape, and tensors with NaN or
    infinity. Absent `num_batches_tracked` counters are tolerated and noted: evaluation does not read them.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    counters = [key for key in missing if key.endswith("num_batches_tracked")]
    missing = [key for key in missing if key not in counters]
    unexpected = [key for key in state if key not in own]
    misshapen = [
        f"{key} (file {tuple(state[key].shape)}, model {tuple(own[key].shape)})"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{name}: {_listing(keys)}"
        for name, keys in (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", misshapen))
        if keys
    ]
    if problems:
        raise UsageError(
            f"the weights in {source} do not fit the model; {'; '.join(problems)}. "
            "Check the model reference and its arguments (number of classes, width, depth)"
        )
    check_finite(state, source)
    notes = []
    narrow = sorted({str(value.dtype) for key, value in state.items() if value.dtype != own[key].dtype})
    if narrow:
        notes.append(f"weights stored as {', '.join(narrow)} were converted to the model's own type")
    if counters:
        notes.append(
            f"{len(counters)} num_batches_tracked counters are absent from the file: evaluation ignores them"
        )
    model.load_state_dict(dict(state), strict=not counters)
    return tuple(notes)


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raises UsageError naming every floating tensor of `state` that holds NaN or infinity."""
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise UsageError(
            f"the weights in {source} hold NaN or infinity in {_listing(broken)}: "
            "the training run that wrote them probably diverged; use an earlier checkpoint"
        )


def _read_safetensors(path: Path) -> object:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UsageError(
            f"{path} is not a safetensors file, or it is truncated ({error}): fetch it again"
        ) from error


def _read_torch(path: Path) -> object:
    with path.open("rb") as file:
        magic = file.read(4)
    if not magic.startswith((b"PK\x03\x04", b"\x80")):  # zip archive; pickle protocol 2 and above
        raise UsageError(
            f"{path} is not a PyTorch checkpoint: {_first_bytes(magic)}; it was perhaps not fetched whole"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # what they warn of is told below, or does not matter
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise UsageError(
            f"{path} holds pickled Python objects{f' ({found.group(1)})' if found else ''} besides tensors; "
            "unpickling them could run code, so they are refused. Save model.state_dict() alone and give "
            "that file"
        ) from error
    except (RuntimeError, EOFError, LookupError, ValueError, OSError) as error:
        if "TorchScript" in str(error):
            raise UsageError(
                f"{path} is a TorchScript archive: save its state_dict() with torch.save and give that file"
            ) from error
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UsageError(
            f"{path} is truncated or not a PyTorch checkpoint ({reason}): fetch it again"
        ) from error


def _unwrap(content: object, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    notes = []
    if isinstance(content, Mapping) and not _is_state(content):
        wrapper = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if wrapper is None:
            keys = _listing([str(key) for key in content]) if content else "nothing"
            raise UsageError(
                f"{path} holds no state dict: tensors by name, or such a dict under "
                f"{', '.join(map(repr, WRAPPERS))}, "
                f"are expected; it holds {keys}"
            )
        notes.append(f"{path.name}: the state dict stood under {wrapper!r}")
        content = content[wrapper]
    if not isinstance(content, Mapping) or not _is_state(content):
        raise UsageError(f"{path} holds no state dict but {_describe(content)}: save model.state_dict()")
    state: dict[str, Tensor] = dict(content)
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
            notes.append(f"{path.name}: the prefix {prefix!r} of every key was stripped")
    return state, tuple(notes)


def _is_state(content: Mapping[object, object]) -> bool:
    return bool(content) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())


def _describe(content: object) -> str:
    if isinstance(content, Mapping):
        odd = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
        return f"values that are not tensors under {_listing(odd)}" if odd else "an empty dict"
    return f"a {type(content).__name__}"


def _first_bytes(magic: bytes) -> str:
    return f"it begins with the bytes {magic!r}" if magic else "it is empty"


def _listing(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest
