"""The caller's networks as the parents of a merge: copies in evaluation mode on the CPU, with what is known of their
input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from datafree.artefact.load import Artefact
from datafree.cache.store import content_hash
from datafree.errors import UsageError
from datafree.images.preprocess import Preprocess, PreprocessSpec
from datafree.library.images import AsTheyAre, Images
from datafree.models.parent import Parent, count_outputs
from datafree.references.registry import timm_preprocess
from datafree.stages.parents import LoadedParents, merged_input
from pleas.guards import parent_names
from pleas.symmetry.copies import evaluation_copy, plain

Network = nn.Module | Parent | Artefact
Networks = Sequence[Network] | Mapping[str, Network]
Prepared = Preprocess | Mapping[str, Any] | None
_KEYS = frozenset(PreprocessSpec.model_fields)
_EXAMPLE = "{'size': 32, 'mean': [0.5, 0.5, 0.5], 'std': [0.25, 0.25, 0.25]}"


def take_networks(
    given: Networks,
    preprocess: Prepared | Mapping[str, Prepared],
    seen: Images | None,
    base: Network | None = None,
) -> LoadedParents:
    """The networks as parents.

    base: what they were fine-tuned from; it sees images as the first
    seen: images that are normalised already, which say what the input is; None or pixels: `preprocess`, or the
          networks' own configuration, has to say it
    """
    named = _named(given)
    shape = None if seen is None or seen.are_pixels else tuple(seen.values.shape[1:])
    parents = []
    for name, network in named.items():
        own = preprocess
        if isinstance(preprocess, Mapping) and not set(preprocess) <= _KEYS:
            unknown = sorted(set(preprocess) - set(named))
            if unknown:
                raise UsageError(
                    f"preprocess names {unknown[0]!r}: its keys are {', '.join(sorted(_KEYS))}, or the parents' names "
                    f"({', '.join(named)}), each with a mapping of its own"
                )
            own = preprocess.get(name)
        parents.append(_parent(name, network, own, shape))
    common, notes = merged_input(parents)
    origin = None
    if base is not None:
        if not isinstance(base, nn.Module | Parent | Artefact):
            raise UsageError(
                f"base is a {type(base).__name__}: give the torch.nn.Module that all parents were fine-tuned from"
            )
        origin = _parent("base", base, parents[0].preprocess, shape)
    return LoadedParents(tuple(parents), common, notes, origin)


def _named(given: Any) -> dict[str, Network]:
    if isinstance(given, nn.Module):
        raise UsageError("parents is one network: give a list of two or more, [a, b]")
    if isinstance(given, Mapping):
        named = dict(given)
    elif isinstance(given, Sequence) and not isinstance(given, str):
        named = dict(zip(parent_names(len(given)), given, strict=True))
    else:
        raise UsageError(f"parents is a {type(given).__name__}: give a list of networks, [a, b]")
    for name, network in named.items():
        if not isinstance(network, nn.Module | Parent | Artefact):
            raise UsageError(
                f"parent {name} is a {type(network).__name__}: give a torch.nn.Module with its trained weights"
            )
    return named


def _parent(name: str, network: Network, given: Any, shape: tuple[int, ...] | None) -> Parent:
    if isinstance(network, Parent):
        own = network.preprocess if shape is None else AsTheyAre.for_inputs(shape)
        return replace(network, name=name, preprocess=own)
    known, classes = {}, None
    if isinstance(network, Artefact):
        if network.config["input"] is not None:
            known = network.preprocess.to_dict()
        classes = network.heads[0].classes if len(network.heads) == 1 else None
        module = network.module
    else:
        module = network
        known = (
            timm_preprocess(module, {}) if isinstance(getattr(module, "pretrained_cfg", None), dict) else {}
        )
    copied = evaluation_copy(plain(module), share=False).cpu().requires_grad_(False)
    preprocess = AsTheyAre.for_inputs(shape) if shape is not None else _preprocess(name, given, known)
    kind = type(module)
    return Parent(
        name=name,
        module=copied,
        preprocess=preprocess,
        outputs=count_outputs(copied, preprocess),
        classes=classes,
        reference=f"python:{kind.__module__}.{kind.__qualname__}",
        arguments={},
        weights=None,
        fingerprint=content_hash(copied.state_dict()),
    )


def _preprocess(name: str, given: Any, known: Mapping[str, Any]) -> Preprocess:
    if isinstance(given, Preprocess):
        return given
    values: dict[str, Any] = {"interpolation": "bilinear", **known, **(given or {})}
    missing = [key for key in ("size", "mean", "std") if values.get(key) is None]
    if missing:
        raise UsageError(
            f"parent {name} does not say how pixels become its input ({', '.join(missing)} unknown): give "
            f"preprocess={_EXAMPLE} with the numbers it was trained with, or images that are normalised already"
        )
    return Preprocess.of(values)
