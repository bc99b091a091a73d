"""From a folder's description to a network, with nothing run that the folder brought.

A description may come from a stranger. A network is rebuilt from its graph, which is plain data, or as a class of
timm or torchvision; a class of one's own comes back only where the caller passes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

import pleas
from datafree.errors import UsageError
from datafree.images.preprocess import Interpolation, Preprocess
from datafree.models.weights import load_into
from datafree.references.registry import LIBRARIES, Blueprint, build
from pleas.network.graph_check import check_config, expected_shapes
from pleas.parents import MOST

_MOST_MODULES = 100_000
_CLOSE = 1e-3  # largest difference of the outputs of one network in two forms, relative to the largest output


class _Part(pydantic.BaseModel):
    """A part of config.json; keys of newer versions are let through."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _Architecture(_Part):
    reference: str | None
    arguments: dict[str, Any]


class _Head(_Part):
    parents: str
    outputs: int = pydantic.Field(ge=1)
    classes: list[str] | None


class _Input(_Part):
    size: list[int] = pydantic.Field(min_length=2, max_length=2)
    mean: list[float] = pydantic.Field(min_length=1)
    std: list[float] = pydantic.Field(min_length=1)
    interpolation: Interpolation

    @pydantic.model_validator(mode="after")
    def _sensible(self) -> _Input:
        if not all(1 <= side <= 2**15 for side in self.size):
            raise ValueError("size is out of range")
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ValueError("mean and std do not fit each other")
        return self


class _Config(_Part):
    format: Literal[1]
    name: str
    recipe: str | None
    architecture: _Architecture
    input: _Input | None
    heads: list[_Head] = pydantic.Field(min_length=1, max_length=MOST)
    columns: dict[str, list[int]] | None = None
    network: dict[str, Any] | None

    @pydantic.model_validator(mode="after")
    def _columns_of_the_head(self) -> _Config:
        named = {column for own in (self.columns or {}).values() for column in own}
        if self.columns is not None and named != set(range(self.heads[0].outputs)):
            raise ValueError("columns do not name the outputs of the head")
        return self


def check_description(config: Mapping[str, Any], path: Path) -> None:
    """Raise UsageError, naming file and key, unless `config` has what loading reads, each of the right kind."""
    try:
        _Config.model_validate(config)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path}: {key}: {first['msg']}: the artefact is damaged") from error


def rebuild(config: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """The network that a checked `config` describes, with the weights `state`.

    Raises UsageError for a network that is not fully described, for weights that do not fit it, and for a
    reference that would run code: those of `LIBRARIES` alone are followed.
    """
    folder = path.parent
    if config["network"] is not None:
        try:
            module: nn.Module = _graph_network(config["network"], state, path)
        except pleas.InputError as error:
            raise UsageError(f"{path} describes no network of ours ({error}): it is damaged") from error
    else:
        module = _library_network(config["architecture"], state, folder)
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        raise _unfit(folder, str(error)) from error
    return module


def fill_own(
    model: nn.Module | Callable[[], nn.Module],
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    path: Path,
) -> nn.Module:
    """The caller's own class with the weights `state`; compared with the saved graph where there is one.

    model: a module, or what returns one when called without arguments
    """
    folder, network = path.parent, config["network"]
    module = model if isinstance(model, nn.Module) else model()
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"model= gave a {type(module).__name__}: pass a torch.nn.Module, or what returns one"
        )
    own = {name: value for name, value in state.items() if not name.startswith("constants.")}
    arguments = config["architecture"]["arguments"]
    said = (
        f"; {path.name} names the arguments {arguments}, for example model=lambda: MyClass(...)"
        if arguments
        else ""
    )
    try:
        load_into(module, own, str(folder))
    except UsageError as error:
        raise UsageError(
            f"{error}. Either the module given as model= is not the class that was merged{said}; or "
            "the network is wider than its class, as above 1.0x: load it without model=, as the graph it was saved as"
        ) from error
    module.eval()
    if network is not None and config["input"] is not None:
        _compare(module, rebuild(config, state, path), config["input"], folder)
    return module


def _compare(module: nn.Module, saved: nn.Module, described: Mapping[str, Any], folder: Path) -> None:
    shape = Preprocess(tuple(described["size"]), tuple(described["mean"]), tuple(described["std"])).shape
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = saved(images), module(images)
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
        raise UsageError(
            f"the module given as model= does not return what {folder} does: {tuple(ours.shape)}"
        )
    apart = float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-12))
    if not apart <= _CLOSE:
        raise UsageError(
            f"the module given as model= has the tensors of {folder} and returns other numbers ({apart:.1%} apart): "
            "it is another definition than the one that was merged"
        )


def _graph_network(network: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """Shapes are compared first, so that no more memory is taken than the weights in the file need."""
    if network.get("format") == 1:
        check_config(network)
        _check_shapes(expected_shapes(network), state, path.parent)
    try:
        return pleas.module_from_config(network)
    except (
        AssertionError,
        AttributeError,
        IndexError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise UsageError(f"{path} describes no network that can be built ({error}): it is damaged") from error


def _check_shapes(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor], folder: Path) -> None:
    wrong = [
        name for name, shape in expected.items() if name not in state or tuple(state[name].shape) != shape
    ]
    wrong += [name for name in state if name not in expected]
    if wrong:
        raise _unfit(folder, f"{', '.join(wrong[:5])} differ{'s' if len(wrong) == 1 else ''}")


def _unfit(folder: Path, why: str) -> UsageError:
    return UsageError(
        f"{folder}: model.safetensors does not fit the network in config.json: {why}. The files come from different "
        "artefacts, or the architecture changed with a new version of its package"
    )


def _library_network(described: Mapping[str, Any], state: Mapping[str, Tensor], folder: Path) -> nn.Module:
    reference = described["reference"]
    if reference is None or not reference.startswith(LIBRARIES):
        raise UsageError(
            f"{folder} asks for the architecture {reference!r}, and loading an artefact never runs code of its own: "
            f"only {' and '.join(LIBRARIES)} names are followed. If you have the class and trust it, pass it: "
            "datafree.load(folder, model=MyClass)"
        )
    with at_most(2 * sum(value.numel() for value in state.values()) + 1_000_000, folder):
        built: Blueprint = build(reference, described["arguments"], folder)
    return built.module


@contextmanager
def at_most(numbers: int, folder: Path) -> Iterator[None]:
    """Networks built inside may hold so many numbers; more raise UsageError before they are filled."""
    held, modules = 0, 0

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal held
        held += 0 if tensor is None else tensor.numel()
        if held > numbers:
            raise _unfit(folder, "the architecture it names has many more weights than the file")

    def count_modules(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        if modules > _MOST_MODULES:
            raise _unfit(folder, f"the architecture it names has over {_MOST_MODULES:,} modules")

    hooks = [
        registration.register_module_parameter_registration_hook(count),
        registration.register_module_buffer_registration_hook(count),
        registration.register_module_module_registration_hook(count_modules),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
