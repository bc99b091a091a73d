"""Model references: one line of a recipe that names an architecture, without guessing and without network.

timm:resnet50                        torchvision:resnet50
python:package.module:callable       python:relative/file.py:callable   (relative to the recipe)
local-dir:FOLDER                     a folder that this tool or timm saved
hf-hub:OWNER/NAME[@REVISION]         such a folder in the local cache of the Hugging Face Hub
"""

from __future__ import annotations

import difflib
import importlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from datafree.errors import UsageError
from datafree.offline import is_offline
from datafree.references import user_code
from datafree.spec import resolve_path

SPELLINGS = (
    "timm:NAME",
    "torchvision:NAME",
    "python:package.module:callable",
    "python:relative/file.py:callable",
    "local-dir:FOLDER",
    "hf-hub:OWNER/NAME",
)
ARTEFACT_MARK = "datafree"  # the key in config.json that tells this tool's folders from timm's
LIBRARIES = ("timm:", "torchvision:")  # kinds that mean the same on every machine and run no code of a file
_DOWNLOADING = (
    "pretrained", "weights", "weights_backbone", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay",
    "cache_dir",
)  # fmt: skip
WRAPPERS = (
    ("OptimizedModule", "_orig_mod"),
    ("DataParallel", "module"),
    ("DistributedDataParallel", "module"),
)
_OF_THE_HUB = ["config.json", "model.safetensors", "pytorch_model.bin"]
_NAMES = ("model_name", "name")  # what timm and torchvision call the architecture itself


@dataclass(frozen=True)
class Blueprint:
    """A model that a reference built, and what the reference knew besides: nothing here was read from a
    checkpoint.

    configured: preprocessing values (size, mean, std, interpolation), as far as known; source: where they
    come from
    weights: the checkpoint lying beside the architecture in a `local-dir:`, or None
    trained: True when the module already carries its weights
    notes:   one sentence for everything that was done to what a user's callable returned
    """

    module: nn.Module
    configured: Mapping[str, Any]
    source: str
    weights: Path | None = None
    trained: bool = False
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


Builder = Callable[[str, Mapping[str, Any], Path, bool], Blueprint]
BUILDERS: dict[str, Builder] = {}


def register(kind: str) -> Callable[[Builder], Builder]:
    """Make `kind:...` a model reference; a kind that is taken raises ValueError."""

    def add(builder: Builder) -> Builder:
        if kind in BUILDERS:
            raise ValueError(f"model reference kind {kind!r} is registered already")
        BUILDERS[kind] = builder
        return builder

    return add


def build_model(reference: str, arguments: Mapping[str, Any], base: Path) -> nn.Module:
    """The bare architecture of `reference`, in evaluation mode; its weights are random unless the reference
    has some.

    base: the folder relative files start from. Raises UsageError for a reference nothing can be built from.
    """
    return build(reference, arguments, base).module.eval()


def build(reference: str, arguments: Mapping[str, Any], base: Path, pretrained: bool = False) -> Blueprint:
    """Build what `reference` names. `pretrained` lets timm and torchvision fetch their published weights."""
    kind, colon, rest = reference.partition(":")
    if not colon or kind not in BUILDERS or not rest:
        raise UsageError(_unknown_reference(reference, kind if colon else None))
    return BUILDERS[kind](rest, arguments, base, pretrained)


@register("timm")
def _timm(name: str, arguments: Mapping[str, Any], base: Path, pretrained: bool) -> Blueprint:
    import timm

    _refuse_downloads(f"timm:{name}", arguments)
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or not timm.is_model(name):
        raise UsageError(
            f"timm:{name}: timm {timm.__version__} has no such model{_suggest(name, timm.list_models())}"
        )
    module = _call(
        timm.create_model, f"timm:{name}", {"model_name": name, "pretrained": pretrained, **arguments}
    )
    return Blueprint(module, timm_preprocess(module, arguments), "timm's pretrained_cfg", trained=pretrained)


@register("torchvision")
def _torchvision(name: str, arguments: Mapping[str, Any], base: Path, pretrained: bool) -> Blueprint:
    import torchvision
    from torchvision import models

    _refuse_downloads(f"torchvision:{name}", arguments)
    known = models.list_models(module=models)
    if name not in known:
        version = torchvision.__version__
        raise UsageError(
            f"torchvision:{name}: torchvision {version} has no such classifier{_suggest(name, known)}"
        )
    published = getattr(models.get_model_weights(name), "DEFAULT", None)
    weights = published if pretrained else None
    module = _call(
        models.get_model, f"torchvision:{name}", {"name": name, "weights": weights, **_quiet(name, arguments)}
    )
    configured: dict[str, Any] = {}
    if published is not None:
        preset = published.transforms()
        configured = {
            "size": preset.crop_size[0],
            "mean": preset.mean,
            "std": preset.std,
            "interpolation": preset.interpolation.value,
        }
    return Blueprint(module, configured, "torchvision's published weights", trained=pretrained)


@register("python")
def _python(rest: str, arguments: Mapping[str, Any], base: Path, pretrained: bool) -> Blueprint:
    place, colon, name = rest.rpartition(":")
    reference = f"python:{rest}"
    if not colon or not place or not name.isidentifier():
        raise UsageError(
            f"{reference!r} is not complete: write python:package.module:callable or "
            "python:relative/file.py:callable"
        )
    module = (
        _module_from_file(place, base, reference)
        if place.endswith(".py")
        else _module_by_name(place, reference, base)
    )
    function = getattr(module, name, None)
    if isinstance(function, nn.Module):
        raise UsageError(
            f"{reference}: {name!r} in {place} is a model, not what builds one; all parents would share it. Name the "
            f"class, or a function that returns it: `def make(): return {type(function).__name__}(...)`"
        )
    if not callable(function):
        found = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(f"{reference}: {place} has no callable {name!r}{_suggest(name, found)}")
    built, notes = plain_module(_call(function, reference, dict(arguments)), reference)
    return Blueprint(built, {}, reference, notes=notes)


def plain_module(built: Any, reference: str) -> tuple[nn.Module, tuple[str, ...]]:
    """The network in what a user's callable returned, on the CPU, and what had to be taken off it.

    `torch.compile(...)`, DataParallel and DistributedDataParallel are unwrapped wherever they stand. Raises
    UsageError for anything that is no module with values: TorchScript, meta tensors, layers never initialised.
    """
    if not isinstance(built, nn.Module):
        raise UsageError(f"{reference} returned a {type(built).__name__}: it must return a torch.nn.Module")
    module, notes = built, []
    for kind, name in WRAPPERS:
        module, found = _unwrap(module, kind, name)
        notes += [f"{reference} returned a network in {kind}, which was taken off"] * found
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise UsageError(
            f"{reference} returned a TorchScript module: return the torch.nn.Module it was made from"
        )
    tensors = [*module.named_parameters(), *module.named_buffers()]
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy:
        raise UsageError(
            f"{reference} returned a network whose shapes are not known yet ({lazy[0]}): give its lazy layers their "
            "sizes, or run it on one batch before returning it"
        )
    meta = [name for name, tensor in tensors if tensor.is_meta]
    if meta:
        raise UsageError(
            f"{reference} returned tensors without values (device meta: {meta[0]} and {len(meta) - 1} more): build "
            "the network on the CPU, without `with torch.device('meta')` or init_empty_weights"
        )
    devices = {str(tensor.device) for _, tensor in tensors} - {"cpu"}
    if devices:
        notes.append(
            f"{reference} returned a network on {', '.join(sorted(devices))}, which was moved to the CPU"
        )
        module = module.cpu()
    return module, tuple(notes)


def _unwrap(module: nn.Module, kind: str, name: str) -> tuple[nn.Module, bool]:
    """`module` without wrappers of the class `kind`, which hold what they wrap as `name`; and if there were any."""
    found = False
    while type(module).__name__ == kind and isinstance(getattr(module, name, None), nn.Module):
        module, found = getattr(module, name), True
    if kind == "OptimizedModule" and getattr(module, "_compiled_call_impl", None) is not None:
        module._compiled_call_impl, found = None, True  # pyright: ignore[reportAttributeAccessIssue]
    for key, child in list(module._modules.items()):
        if child is not None:
            module._modules[key], inside = _unwrap(child, kind, name)
            found |= inside
    return module, found


@register("local-dir")
def _local_dir(rest: str, arguments: Mapping[str, Any], base: Path, pretrained: bool) -> Blueprint:
    folder = resolve_path(rest, base)
    config_file = folder / "config.json"
    if not config_file.is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise UsageError(f"local-dir:{rest}: {folder} {what}: give a folder that datafree or timm saved")
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise UsageError(f"local-dir:{rest}: {config_file} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise UsageError(f"local-dir:{rest}: {config_file} holds a {type(config).__name__}, not an object")
    if ARTEFACT_MARK in config:
        return _from_artefact(folder, rest, arguments)
    if "architecture" in config:
        return _from_timm_folder(folder, rest, arguments)
    raise UsageError(
        f"local-dir:{rest}: {config_file} names no architecture: it was saved neither by datafree nor by timm"
    )


@register("hf-hub")
def _hub(rest: str, arguments: Mapping[str, Any], base: Path, pretrained: bool) -> Blueprint:
    """The network is asked only where the recipe says `pretrained: true` and `allow_download: true`."""
    hub: Any = importlib.import_module("huggingface_hub")  # timm brings it
    name, _, revision = rest.partition("@")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None:
        raise UsageError(f"hf-hub:{rest}: write hf-hub:OWNER/NAME, or hf-hub:OWNER/NAME@REVISION")
    local = not pretrained or is_offline()
    try:
        folder = hub.snapshot_download(
            name, revision=revision or None, local_files_only=local, allow_patterns=_OF_THE_HUB
        )
    except (OSError, ValueError) as error:  # of the hub: not cached, not there, not let in, no network
        reason = str(error).splitlines()[0]
        where = "is not in the local cache of the Hub" if local else "could not be fetched"
        raise UsageError(
            f"hf-hub:{rest}: {where} ({reason}): fetch it with `huggingface-cli download {name}`, or say `pretrained: "
            "true` and `allow_download: true`"
        ) from error
    found = _local_dir(str(folder), arguments, base, pretrained)
    return replace(found, source=f"config.json of hf-hub:{rest}")


def _from_artefact(folder: Path, rest: str, arguments: Mapping[str, Any]) -> Blueprint:
    from datafree.artefact.load import load

    if arguments:
        raise UsageError(
            f"local-dir:{rest}: a folder saved by datafree takes no arguments; remove {dict(arguments)}"
        )
    artefact = load(folder)
    known = artefact.config["input"] is not None
    return Blueprint(
        artefact.module,
        artefact.preprocess.to_dict() if known else {},
        f"{folder / 'config.json'}",
        trained=True,
        classes=artefact.heads[0].classes if len(artefact.heads) == 1 else None,
    )


def _from_timm_folder(folder: Path, rest: str, arguments: Mapping[str, Any]) -> Blueprint:
    import timm

    files = [
        folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()
    ]
    if not files:
        raise UsageError(f"local-dir:{rest}: {folder} holds neither model.safetensors nor pytorch_model.bin")
    _refuse_downloads(f"local-dir:{rest}", arguments)
    module = _call(timm.create_model, f"local-dir:{rest}", {"model_name": f"local-dir:{folder}", **arguments})
    labels = module.pretrained_cfg.get("label_names")
    classes = tuple(labels) if isinstance(labels, list | tuple) else None
    return Blueprint(
        module,
        timm_preprocess(module, arguments),
        f"{folder / 'config.json'}",
        weights=files[0],
        classes=classes,
    )


def timm_preprocess(module: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    config = module.pretrained_cfg
    found = {key: config.get(key) for key in ("mean", "std", "interpolation")}
    size = config.get("input_size")
    found["size"] = tuple(size[1:]) if size else None
    if found["mean"] is not None and arguments.get("in_chans", len(found["mean"])) != len(found["mean"]):
        found["mean"] = found["std"] = None  # in_chans was changed: the published numbers no longer apply
    return {key: value for key, value in found.items() if value is not None}


def _quiet(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """torchvision's GoogLeNet and Inception warn about their initialisation unless told which one to use."""
    return {"init_weights": True, **arguments} if name in ("googlenet", "inception_v3") else dict(arguments)


def _call(function: Callable[..., Any], reference: str, arguments: Mapping[str, Any]) -> Any:
    return user_code.call(function, reference, arguments)


def _module_by_name(name: str, reference: str, base: Path | None = None) -> Any:
    return user_code.import_module(name, base or Path.cwd(), reference)


def _module_from_file(place: str, base: Path, reference: str) -> Any:
    path = resolve_path(place, base)
    if not path.is_file():
        raise UsageError(
            f"{reference}: the file {path} does not exist (paths start from the recipe's folder, {base})"
        )
    return user_code.import_file(path, reference)


def _refuse_downloads(reference: str, arguments: Mapping[str, Any]) -> None:
    twice = [key for key in _NAMES if key in arguments]
    if twice:
        raise UsageError(f"{reference}: the argument {twice[0]!r} would name another model: remove it")
    named = [key for key in _DOWNLOADING if key in arguments]
    if named:
        raise UsageError(
            f"{reference}: the argument {named[0]!r} is not passed on, because it may download or load "
            "weights unseen; "
            "use the parent's own keys: `weights: FILE`, or `pretrained: true` with `allow_download: true`"
        )


def _unknown_reference(reference: str, kind: str | None) -> str:
    spellings = "; ".join(SPELLINGS)
    if kind in BUILDERS:
        return f"model reference {reference!r} names nothing after the colon. Valid spellings: {spellings}"
    if kind is not None:
        near = difflib.get_close_matches(kind, BUILDERS, n=1)
        hint = f" Did you mean {near[0] + ':' + reference.partition(':')[2]!r}?" if near else ""
        return f"model reference {reference!r}: unknown kind {kind!r}.{hint} Valid spellings: {spellings}"
    import timm
    from torchvision import models

    homes = {"torchvision": models.list_models(module=models), "timm": timm.list_models()}
    near = [
        repr(f"{home}:{name}")
        for home, names in homes.items()
        for name in difflib.get_close_matches(reference, names, n=1)
    ]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"model reference {reference!r} has no kind.{hint} Valid spellings: {spellings}"


def _suggest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join(near)}?" if near else ""
