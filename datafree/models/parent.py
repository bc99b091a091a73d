"""The parents: a model reference, its weights and its preprocessing become one frozen `Parent`.

What may be written as a reference is in `references`; how files are read, in `weights`; inputs, in
`preprocess`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, get_args

import pydantic
import torch
from torch import nn

from datafree.cache.store import content_hash
from datafree.errors import UsageError
from datafree.images.preprocess import Interpolation, Preprocess, PreprocessSpec
from datafree.models.weights import check_finite, load_into, load_weights
from datafree.offline import is_offline
from datafree.references.registry import Blueprint, build, build_model
from datafree.references.user_code import place_of
from datafree.seeds import derive_seed
from datafree.spec import Spec, resolve_path

__all__ = [
    "BaseSpec",
    "NetworkSpec",
    "Parent",
    "ParentSpec",
    "Preprocess",
    "PreprocessSpec",
    "build_model",
    "load_base",
    "load_parent",
    "load_weights",
]

Progress = Callable[[str, int, int], None]  # stage, done, total

DIGITS = "digits:"  # weights: digits:NAME, an expert of the quickstart
BUILDER = "builder"  # weights: builder, the python: callable returns a trained model


class NetworkSpec(Spec):
    """A network in a recipe, and where its weights come from.

    model:      a model reference; `arguments` go to whatever it names
    weights:    a checkpoint file; "builder" where a python: callable returns a trained model; "digits:NAME"
                for an expert of the quickstart
    weights_key: which state dict, where the file holds several: model_ema, or ema.state_dict for one inside another
    random_weights, pretrained: the two other ways to have weights, both said openly; `pretrained` may fetch
                files and needs `allow_download: true` beside it
    """

    model: str
    arguments: dict[str, Any] = pydantic.Field(default_factory=dict)
    weights: str | None = None
    weights_key: str | None = None
    random_weights: bool = False
    pretrained: bool = False
    allow_download: bool = False

    @pydantic.model_validator(mode="after")
    def _one_source_of_weights(self) -> Self:
        given = [key for key in ("weights", "random_weights", "pretrained") if getattr(self, key)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given together: give exactly one source of weights")
        if self.weights_key is not None and (self.random_weights or self.pretrained):
            raise ValueError("weights_key names an entry of a weights file, and there is none: remove it")
        if self.pretrained and not self.allow_download:
            raise ValueError(
                "pretrained: true may fetch weights from the network: say `allow_download: true` as well, "
                "or give `weights: FILE`"
            )
        if self.allow_download and not self.pretrained:
            raise ValueError(
                "allow_download: true has no effect without pretrained: true; remove it or say both"
            )
        return self


class ParentSpec(NetworkSpec):
    """One parent in a recipe: a network, and besides

    preprocess: whatever the model's own configuration does not say, or says differently
    classes:    label names, in the order of the outputs
    """

    preprocess: PreprocessSpec = PreprocessSpec()
    classes: tuple[str, ...] | None = None


class BaseSpec(NetworkSpec):
    """The network that all parents were fine-tuned from, in their own architecture.

    It is no parent: the merged network does not answer for it. Units then stay in place unless moving clearly helps,
    and the methods of task vectors can be compared. Its head may have another number of outputs than the parents'
    (say so in `arguments`); it sees images as the first parent does.
    """


@dataclass(frozen=True)
class Parent:
    """A trained network, frozen and in evaluation mode.

    outputs:     how many numbers it returns per image
    weights:     the checkpoint file, or None when weights came otherwise (`notes` says how)
    notes:       one sentence for everything that was done to load it
    pretrained:  whether the weights are those published with the reference
    fingerprint: SHA-256 of the state dict
    """

    name: str
    module: nn.Module
    preprocess: Preprocess
    outputs: int
    classes: tuple[str, ...] | None
    reference: str
    arguments: Mapping[str, Any]
    weights: Path | None
    fingerprint: str
    notes: tuple[str, ...] = field(default=())
    pretrained: bool = False


def load_parent(
    spec: ParentSpec, name: str, base: Path, *, probe: bool = False, progress: Progress | None = None
) -> Parent:
    """Build the parent called `name` ("a", "b") from its section of a recipe that lies in folder `base`.

    probe: do not train an expert of the quickstart that is not cached yet; a sketch stands in and a note says
    so Raises UsageError, with the parent's name, for anything the section got wrong.
    """
    try:
        return _load(spec, name, base, probe, progress)
    except UsageError as error:
        raise UsageError(f"parent {name}: {error}", *error.key) from error


def load_base(
    spec: BaseSpec, like: Parent, base: Path, *, probe: bool = False, progress: Progress | None = None
) -> Parent:
    """Build the common base of parents such as `like`, which says how its input is prepared.

    Raises UsageError for anything its section got wrong.
    """
    seen = like.preprocess
    preprocess = PreprocessSpec(
        size=seen.size, mean=seen.mean, std=seen.std, interpolation=seen.interpolation
    )
    try:
        return _load(ParentSpec(**spec.model_dump(), preprocess=preprocess), "base", base, probe, progress)
    except UsageError as error:
        raise UsageError(f"the base: {error}", *error.key) from error


def _load(spec: ParentSpec, name: str, base: Path, probe: bool, progress: Progress | None) -> Parent:
    if spec.pretrained and is_offline():
        raise UsageError(
            "pretrained: true may fetch weights, which --offline forbids: name a file under `weights`, "
            "or run without it"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(0, "random weights", name))  # a and b differ where weights stay random
        blueprint = build(spec.model, spec.arguments, base, pretrained=spec.pretrained)
    module = blueprint.module
    path, notes = _fill(spec, blueprint, base, probe, progress)
    module = module.eval().requires_grad_(False)
    state = module.state_dict()
    check_finite(state, str(path or spec.model))
    preprocess = _preprocess(spec, blueprint)
    outputs = count_outputs(module, preprocess)
    classes = spec.classes or blueprint.classes
    if classes is not None and len(classes) != outputs:
        raise UsageError(
            f"classes has {len(classes)} names and the model returns {outputs} numbers per image"
        )
    return Parent(
        name=name,
        module=module,
        preprocess=preprocess,
        outputs=outputs,
        classes=classes,
        reference=spec.model,
        arguments=dict(spec.arguments),
        weights=path,
        fingerprint=content_hash(state),
        notes=blueprint.notes + notes,
        pretrained=spec.pretrained,
    )


def _fill(
    spec: ParentSpec, blueprint: Blueprint, base: Path, probe: bool, progress: Progress | None
) -> tuple[Path | None, tuple[str, ...]]:
    """Give the blueprint's module its weights; returns the file they came from, if one did, and notes."""
    if spec.random_weights:
        return None, ("the weights are random, as the recipe says",)
    if spec.pretrained and blueprint.weights is None:  # else they lie in a file, beside the architecture
        return None, (
            f"published weights of {spec.model}, fetched or from the local cache, as the recipe allows",
        )
    if spec.weights == BUILDER:
        if not spec.model.startswith("python:"):
            raise UsageError(
                f"weights: builder says that a python: callable returns a trained model; model is "
                f"{spec.model}"
            )
        return None, (f"the weights are those that {spec.model} returned",)
    if spec.weights is not None and spec.weights.startswith(DIGITS):
        return _fill_with_digits(spec.weights, blueprint.module, probe, progress)
    if spec.weights is None:
        if blueprint.trained:
            return blueprint.weights, (f"the weights came with {spec.model}",)
        if blueprint.weights is None:
            raise UsageError(
                f"{spec.model} has no weights: give `weights: FILE`, or say `random_weights: true` if that "
                "is meant"
                + (
                    "; `weights: builder` if the callable returns a trained model"
                    if spec.model.startswith("python:")
                    else ""
                )
            )
    path = resolve_path(spec.weights, base) if spec.weights is not None else blueprint.weights
    assert path is not None
    state, notes = load_weights(path, spec.weights_key, blueprint.module)
    return path, notes + load_into(blueprint.module, state, path.name)


def _fill_with_digits(
    reference: str, module: nn.Module, probe: bool, progress: Progress | None
) -> tuple[Path | None, tuple[str, ...]]:
    from datafree import digits

    expert = digits.expert(reference.removeprefix(DIGITS))
    path = expert.path()
    if probe and not path.is_file():
        load_into(module, digits.sketch(expert), reference)
        return None, (f"{reference} is not trained yet: a merge trains it first, in under a minute",)
    state, said = digits.weights(expert, progress)
    return path, (said, *load_into(module, state, reference))


def _preprocess(spec: ParentSpec, blueprint: Blueprint) -> Preprocess:
    """The recipe's values first, then those the model was published with; what stays unknown is an error."""
    values = {
        "interpolation": "bilinear",
        **blueprint.configured,
        **spec.preprocess.model_dump(exclude_none=True),
    }
    unknown = [key for key in ("size", "mean", "std") if key not in values]
    if unknown:
        raise UsageError(
            f"{spec.model} does not say how its input is prepared ({', '.join(unknown)} unknown): add for "
            "example "
            "`preprocess: {size: 32, mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}` to the parent, "
            "with the numbers it was trained with"
        )
    if len(values["mean"]) != len(values["std"]):
        raise UsageError(
            f"preprocess: mean has {len(values['mean'])} numbers and std {len(values['std'])} "
            f"(what the recipe leaves out comes from {blueprint.source}): give both in the recipe"
        )
    if values["interpolation"] not in get_args(Interpolation):
        raise UsageError(
            f"{blueprint.source} asks for interpolation {values['interpolation']!r}, which is not supported: "
            f"choose one of {', '.join(get_args(Interpolation))} under preprocess"
        )
    size = values["size"]
    return Preprocess(
        size=(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
        mean=tuple(float(value) for value in values["mean"]),
        std=tuple(float(value) for value in values["std"]),
        interpolation=values["interpolation"],
    )


def count_outputs(module: nn.Module, preprocess: Preprocess) -> int:
    """Numbers per image that `module` returns, found on fake tensors: shapes only, no arithmetic."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    shape = " x ".join(str(side) for side in preprocess.shape)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode, torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
            state: dict[str, torch.Tensor] = {
                key: mode.from_tensor(value) for key, value in module.state_dict(keep_vars=True).items()
            }
            output = torch.func.functional_call(module, state, (torch.zeros(2, *preprocess.shape),))
    except Exception as error:  # whatever the user's forward raises
        reason = str(error).splitlines()[0] if str(error) else ""
        reason = reason if isinstance(error, RuntimeError) else f"{type(error).__name__}: {reason}"
        where = place_of(error)
        reason += f" ({where})" if where else ""
        raise UsageError(
            f"the model does not accept an image of {shape} (channels x height x width): {reason}. "
            "Check preprocess (size, and as many numbers in mean as channels)"
        ) from error
    if not isinstance(output, torch.Tensor):
        raise UsageError(
            f"the model returns a {type(output).__name__}, not one tensor of shape (images, classes)"
        )
    if output.ndim != 2 or output.shape[0] != 2:
        raise UsageError(
            f"the model returns shape {tuple(output.shape)} for 2 images; a classifier returns (images, "
            "classes)"
        )
    return int(output.shape[1])
