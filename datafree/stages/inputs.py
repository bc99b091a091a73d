"""The images of a run: evaluation, proxies, oracle, and the guard that keeps them apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

import pleas
from datafree.evaluation.evaluate import Task, check_tasks, load_task
from datafree.images.image_set import ImageSet, load_images
from datafree.proxy import ProxySet, ProxySpec, build_proxies
from datafree.proxy.settle import images_until_settled
from datafree.seeds import derive_seed
from datafree.stages.parents import LoadedParents
from datafree.stages.work import Work


@dataclass(frozen=True)
class EvaluationSet:
    """The tasks of a recipe; their images are hashed once, when somebody asks."""

    tasks: tuple[Task, ...]

    @cached_property
    def hashes(self) -> Mapping[str, tuple[str, ...]]:
        """Content hashes of every task's images."""
        return {task.name: tuple(task.images.hashes()) for task in self.tasks}

    @cached_property
    def fingerprint(self) -> str:
        content = [
            [task.name, task.expert, self.hashes[task.name], task.targets.tolist(), task.class_names()]
            for task in self.tasks
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_tasks(work: Work, parents: LoadedParents, *, verify: bool = True) -> EvaluationSet:
    """The evaluation images, checked against the heads there will be."""
    recipe, tasks = work.recipe, []
    heads = parents.columns(recipe.recipe.labels)
    with work.progress.stage("images"):
        for index, spec in enumerate(recipe.recipe.evaluate):
            with recipe.at("evaluate", index):
                task = load_task(spec, recipe.base, verify=verify)
                check_tasks([task], heads)
            tasks.append(task)
    return EvaluationSet(tuple(tasks))


def make_proxies(work: Work, parents: LoadedParents, tasks: EvaluationSet) -> ProxySet:
    """The proxy images, none of which is an evaluation image unless the recipe allows it."""
    recipe, spec = work.recipe, work.recipe.recipe.proxy

    def build(wanted: ProxySpec) -> ProxySet:
        return build_proxies(
            wanted,
            list(parents.each),
            work.seed,
            work.store.root,
            recipe.base,
            progress=work.progress,
            device=str(work.device),
        )

    with work.progress.stage("proxies"), recipe.at("proxy"):
        proxies = build(spec if spec.settle is None else _settled(work, parents, build, spec.settle))
    refuse_leak(work, "the proxies", proxies.hashes(), tasks, "proxy")
    return proxies


def make_refine_proxies(work: Work, parents: LoadedParents, tasks: EvaluationSet) -> ProxySet | None:
    """The further images that only refining sees; None where the recipe asks for none."""
    recipe, refine = work.recipe, work.recipe.recipe.refine
    if refine is None or refine.proxies is None:
        return None
    with work.progress.stage("proxies for refining"), recipe.at("refine", "proxies"):
        proxies = build_proxies(
            refine.proxies,
            list(parents.each),
            refine_seed(work),
            work.store.root,
            recipe.base,
            progress=work.progress,
            device=str(work.device),
        )
    refuse_leak(work, "the proxies for refining", proxies.hashes(), tasks, "refine", "proxies")
    return proxies


def refine_seed(work: Work) -> int:
    """Of the further proxies: another than the merge's, whose images they would repeat."""
    return derive_seed(work.seed, "refine", "proxies")


def _settled(
    work: Work, parents: LoadedParents, build: Callable[[ProxySpec], ProxySet], tolerance: float
) -> ProxySpec:
    """The recipe's proxies, as few as it takes for the second moments to settle; a note says how few."""
    spec = work.recipe.recipe.proxy
    networks = pleas.Parents.of(
        [parent.module for parent in parents.each],
        parents.example,
        parents.settings(work),
        names=parents.names,
    )

    def collect(batches: Sequence[Tensor], first: int, total: int) -> pleas.Statistics:
        inputs = Inputs(lambda _: iter(batches), sum(map(len, batches)), "", 64, parents, work.device)
        return pleas.collect(networks, inputs, first_image=first, images=total)

    found = images_until_settled(spec, build, collect, tolerance=tolerance)
    if not found.changes:
        work.progress.note(f"proxies: {found.images} images are too few to see their moments settle")
        return spec
    layer, change = found.worst(found.images)
    work.progress.note(
        f"proxies: {found.images} images, at which the second moments {'have' if found.settled else 'have not'} "
        f"settled: the last doubling moved {layer} by {100 * change:.1f} %, {100 * tolerance:g} % are allowed"
    )
    return spec.model_copy(update={"count": found.images})


def load_oracle(work: Work, tasks: EvaluationSet, *, verify: bool = True) -> ImageSet | None:
    """The real images of the oracle, `count` of them chosen by the seed; None when the recipe has no
    oracle.
    """
    recipe, spec = work.recipe, work.recipe.recipe.oracle
    if spec is None:
        return None
    with recipe.at("oracle", "images"):
        images = load_images(spec.images, recipe.base, verify=verify)
    if spec.count > len(images):
        raise recipe.error(
            f"{spec.count} images are asked for, but {images.name} has {len(images)}: lower the count",
            "oracle",
            "count",
        )
    order = np.random.default_rng(derive_seed(work.seed, "oracle")).permutation(len(images))
    chosen = images.select(np.sort(order[: spec.count]))
    if verify:
        refuse_leak(work, "the oracle's images", chosen.hashes(), tasks, "oracle", "images")
    return chosen


def refuse_leak(work: Work, what: str, hashes: Sequence[str], tasks: EvaluationSet, *key: str | int) -> None:
    """Raise if an evaluation image is among images that the merge is made from; a note where the recipe
    allows it.
    """
    known = set(hashes)
    for task in tasks.tasks:
        shared = sum(digest in known for digest in tasks.hashes[task.name])
        if not shared:
            continue
        found = f"{shared} of the {len(task.images)} evaluation images of task {task.name!r} are among {what}"
        if not work.recipe.recipe.proxy.allow_leak:
            raise work.recipe.error(
                f"{found}, so its accuracy would mean little: choose other images, or say "
                "`proxy.allow_leak: true`",
                *key,
            )
        work.progress.note(f"{found}; the recipe allows it (proxy.allow_leak)")


def proxy_inputs(work: Work, parents: LoadedParents, proxies: ProxySet) -> Inputs:
    return Inputs(
        proxies.batches,
        len(proxies),
        proxies.fingerprint,
        work.recipe.recipe.merge.batch,
        parents,
        work.device,
    )


def image_inputs(work: Work, parents: LoadedParents, images: ImageSet) -> Inputs:
    def batches(size: int) -> Iterator[Tensor]:
        for start in range(0, len(images), size):
            yield images.batch(range(start, min(start + size, len(images))))

    fingerprint = hashlib.sha256(json.dumps(images.hashes()).encode()).hexdigest()
    return Inputs(batches, len(images), fingerprint, work.recipe.recipe.merge.batch, parents, work.device)


@dataclass(frozen=True)
class Inputs:
    """Images as all parents take them, batch by batch, as often as asked.

    images: gives uint8 batches (n, C, H, W) of the size asked for
    fingerprint: of the images
    """

    images: Callable[[int], Iterator[Tensor]]
    count: int
    fingerprint: str
    batch: int
    parents: LoadedParents
    device: torch.device

    def __len__(self) -> int:
        return -(-self.count // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for images in self.images(self.batch):
            moved = images.to(self.device)
            if self.parents.same_input:
                yield (self.parents.input(moved),) * len(self.parents.each)
            else:
                yield tuple(parent.preprocess(moved) for parent in self.parents.each)

    def merged(self) -> Iterator[Tensor]:
        """The same images as the merged network takes them."""
        for images in self.images(self.batch):
            yield self.parents.input(images.to(self.device))
