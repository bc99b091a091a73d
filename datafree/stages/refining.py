"""Refine: every merged network distils its parents on the proxies, and is kept only where that helps."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

import pleas
from datafree.cache.store import Stage, content_hash
from datafree.proxy import ProxySet
from datafree.proxy.augment import augment_lightly
from datafree.proxy.build import common_input
from datafree.proxy.kinds.inversion import InversionSpec, Opponent, images_in_dispute
from datafree.proxy.source import Request
from datafree.recipe.file import RecipeFile
from datafree.recipe.schema import FreshSpec, RefineSpec
from datafree.seeds import derive_seed
from datafree.stages.holding import source_names, unused_images
from datafree.stages.merging import Merged
from datafree.stages.parents import LoadedParents
from datafree.stages.work import Work
from pleas.refine import (
    Augment,
    Features,
    RefineResult,
    RefineSettings,
    Renew,
    Snapshot,
    Teacher,
    feature_layers,
    kind_of_outputs,
    refine,
    shift_and_flip,
)

PROBES = 16  # images of noise that show whether a network returns logits
EXACT = 1e-9  # mean relative residual of layers that do all their parents do


@torch.no_grad()
def check_refining(work: Work, parents: LoadedParents, networks: pleas.Parents) -> None:
    """Raise before any work where these parents cannot be refined as the recipe asks."""
    recipe = work.recipe
    spec = recipe.recipe.refine
    if spec is None:
        return
    if spec.feature_weight:
        with recipe.at("refine", "feature_weight"):
            feature_layers(networks)
    if spec.fresh is not None:
        noise = torch.rand(PROBES, *parents.input.shape, generator=torch.Generator().manual_seed(0))
        answers = [parent.module(noise) for parent in parents.each]
        _, why = kind_of_outputs(dict(zip(parents.names, answers, strict=True)))
        if why is not None:
            said = "images in dispute are found by comparing predictions of classes, so remove refine.fresh"
            raise recipe.error(f"{why}; {said}", "refine", "fresh")


def refine_merged(
    work: Work,
    parents: LoadedParents,
    evidence: pleas.Evidence,
    proxies: Sequence[ProxySet],
    merged: Sequence[Merged],
) -> tuple[Merged, ...]:
    """The merged networks after refining; nothing where the recipe has no `refine`.

    A finished network is found in the store; an interrupted one goes on from its last check. One whose layers
    reproduce the parents' exactly, as everything kept apart does, has nothing to learn and stays as it is.

    proxies: those of the merge, and further ones where the recipe has some
    """
    spec = work.recipe.recipe.refine
    if spec is None:
        return ()
    settings = _settings(work, spec)
    images = torch.cat([batch for part in proxies for batch in part.batches(256)])
    with work.progress.stage("refine"), work.recipe.at("refine"):
        return tuple(
            _left(work, one)
            if one.result.mean_residual < EXACT
            else _refine_one(work, parents, evidence, proxies, images, one, settings)
            for one in merged
        )


def _left(work: Work, one: Merged) -> Merged:
    work.progress.note(f"{one.point.label}: it already computes what its parents do: nothing to refine")
    return one


def _settings(work: Work, spec: RefineSpec) -> RefineSettings:
    chosen = spec.model_dump(exclude={"augment", "proxies", "fresh", "curve"})
    rounds = 0 if spec.fresh is None else spec.fresh.rounds
    return RefineSettings(**chosen, renewals=rounds, seed=derive_seed(work.seed, "refine"))


def _lightly(images: Tensor, generator: torch.Generator) -> Tensor:
    return augment_lightly(images, int(torch.randint(2**31, (), generator=generator)))


AUGMENT: dict[str, Augment | None] = {"shift": shift_and_flip, "light": _lightly, "none": None}


def fresh_images(
    recipe: RecipeFile, parents: LoadedParents, fresh: FreshSpec, seed: int, device: torch.device
) -> Renew:
    """What makes new proxies for a network in training: a pure function of its weights and the round."""
    spec = next(source for source in recipe.recipe.proxy.sources if isinstance(source, InversionSpec))
    columns = parents.columns(recipe.recipe.labels)
    size, channels = common_input(parents.each)

    def renew(network: nn.Module, number: int) -> Tensor:
        seeded = derive_seed(seed, "refine", "fresh", str(number))
        request = Request(parents.each, size, channels, seeded, recipe.base, device)
        opponent = Opponent(network, parents.input, columns, fresh.weight)
        return images_in_dispute(spec, request, opponent, fresh.count)

    return renew


def _refine_one(
    work: Work,
    parents: LoadedParents,
    evidence: pleas.Evidence,
    proxies: Sequence[ProxySet],
    images: Tensor,
    one: Merged,
    settings: RefineSettings,
) -> Merged:
    spec = work.recipe.recipe.refine
    assert spec is not None
    curve = spec.curve if work.recipe.recipe.evaluate else 0
    meaning = {
        "parents": parents.fingerprint,
        "images": [part.fingerprint for part in proxies],
        "unused": [work.settings.holdout, work.settings.seed],
        "start": content_hash(one.result.module.state_dict()),
        "network": pleas.program_config(one.result.module),
        "settings": asdict(settings),
        "augment": spec.augment,
        "fresh": None if spec.fresh is None else spec.fresh.model_dump(),
        "curve": curve,
        "labels": work.recipe.recipe.labels,
        "places": parents.places,
        "device": work.device.type,
        "torch": torch.__version__,
    }

    def make() -> Stage:
        found = _run(work, parents, evidence, proxies, images, one, spec, settings, curve, meaning)
        modules = {"": found.module} | {f"{i}/": taken.module for i, taken in enumerate(found.snapshots)}
        tensors = {
            prefix + name: tensor
            for prefix, module in modules.items()
            for name, tensor in module.state_dict().items()
        }
        return Stage(tensors, _told(found))

    stage = work.finished("refined", meaning, make)
    work.forget("refining", meaning)
    for note in stage.value["notes"]:
        work.progress.note(f"{one.point.label}: {note}")
    snapshots = tuple(
        Snapshot(taken["step"], taken["seconds"], _with_state(one.result.module, stage.tensors, f"{i}/"))
        for i, taken in enumerate(stage.value["snapshots"])
    )
    module = _with_state(one.result.module, stage.tensors, "")
    return Merged(one.point, replace(one.result, module=module), refined=stage.value, snapshots=snapshots)


def _with_state(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> nn.Module:
    """A copy of `module` with the tensors whose names start with `prefix`."""
    result = copy.deepcopy(module)
    result.load_state_dict({name: tensors[prefix + name] for name in result.state_dict()})
    return result


def _run(
    work: Work,
    parents: LoadedParents,
    evidence: pleas.Evidence,
    proxies: Sequence[ProxySet],
    images: Tensor,
    one: Merged,
    spec: RefineSpec,
    settings: RefineSettings,
    curve: int,
    meaning: Mapping[str, Any],
) -> RefineResult:
    features = None
    if settings.feature_weight:
        features = Features(evidence, one.result.plan)
    kept = work.kept("refining", meaning)
    renew = None
    if spec.fresh is not None:
        renew = fresh_images(work.recipe, parents, spec.fresh, work.seed, work.device)
    return refine(
        one.result.module,
        [Teacher(parent.name, parent.module, parent.preprocess) for parent in parents.each],
        images,
        settings,
        normalise=parents.input,
        heads=work.recipe.recipe.labels,
        outputs=parents.places,
        augment=AUGMENT[spec.augment],
        renew=renew,
        features=features,
        groups=source_names(proxies),
        unused=unused_images(work, proxies),
        snapshots=curve,
        device=work.device,
        state=None if kept is None else _joined(kept.value, kept.tensors),
        checkpoint=lambda state: work.keep("refining", meaning, *_parted(state)),
        progress=lambda text, done, total: work.progress(f"{one.point.label}: {text}", done, total),
    )


def _told(found: RefineResult) -> dict[str, Any]:
    """What the report says of a refined network; `history` is the curve of loss against time."""
    return {
        "kept": found.kept,
        "steps": found.steps,
        "seconds": round(found.seconds, 1),
        "held_out": found.held_out,
        "start": asdict(found.start),
        "refined": asdict(found.refined),
        "history": [asdict(check) for check in found.history],
        "snapshots": [{"step": taken.step, "seconds": taken.seconds} for taken in found.snapshots],
        "notes": list(found.notes),
    }


def _parted(state: Any) -> tuple[dict[str, Tensor], Any]:
    """A nested state as flat tensors, and JSON in which {"tensor": NAME} stands for each of them."""
    tensors: dict[str, Tensor] = {}

    def part(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().clone()
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {"items": [[key, part(item, f"{name}/{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return [part(item, f"{name}/{i}") for i, item in enumerate(value)]
        return value

    plain = part(state, "state")
    return tensors, plain


def _joined(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `_parted`."""
    if isinstance(value, Mapping):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _joined(item, tensors) for key, item in value["items"]}
    if isinstance(value, list):
        return [_joined(item, tensors) for item in value]
    return value
