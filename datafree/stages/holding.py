"""Proxies that nothing learnt from: no layer was solved on them and no refining trained on them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import pleas
from datafree.proxy import ProxySet
from datafree.recipe.schema import RefineSpec
from datafree.seeds import derive_seed
from datafree.stages.work import Work
from pleas.refine.verdict import share_held_out
from pleas.refine.views import split_off
from pleas.solve.propagate import held_out

MOST = 1024  # images on which networks are compared; more would only take longer


@dataclass(frozen=True)
class HeldOut:
    """images: uint8 (N, C, H, W)        fingerprint: of what they are

    owners: (N,) number of the parent whose image each is, where the parents have one head and batch norms that tell
    """

    images: Tensor
    fingerprint: str
    owners: Tensor | None = None


def unsolved(work: Work, count: int) -> Tensor:
    """(count,) True for proxies of the merge on which no layer is solved."""
    held = held_out(count, work.settings.holdout, work.settings.seed)
    return (
        held if bool(held.any()) else ~held
    )  # so few that every one is solved on: then on all, as the solve does


def unused_images(work: Work, proxies: Sequence[ProxySet]) -> Tensor:
    """(images,) True for what no layer is solved on. proxies: those of the merge, and further ones for refining"""
    first, *more = proxies
    return torch.cat(
        [unsolved(work, len(first)), *(torch.ones(len(part), dtype=torch.bool) for part in more)]
    )


def source_names(proxies: Sequence[ProxySet]) -> list[str]:
    """The source of every image by name; those of further proxies by names of their own."""
    first, *more = proxies
    return [*first.source_names, *(f"further {name}" for part in more for name in part.source_names)]


def hold_out(work: Work, proxies: Sequence[ProxySet], evidence: pleas.Evidence) -> HeldOut:
    """The proxies of the merge on which every network of the run is compared with its parents.

    proxies: those of the merge, and further ones for refining
    """
    first, spec = proxies[0], work.recipe.recipe.refine
    unused = unsolved(work, len(first))
    if spec is not None:
        kept = torch.zeros(sum(map(len, proxies)), dtype=torch.bool)
        kept[held_from_refining(work, spec, proxies)] = True
        unused &= kept[: len(first)]
    places = unused.nonzero()[:, 0]
    if len(places) > MOST:
        places = places[torch.linspace(0, len(places) - 1, MOST).round().long()]
    owners = _owners(evidence)
    if owners is not None:
        owners = owners[places]
    meaning = f"{first.fingerprint} {places.tolist()} {None if owners is None else owners.tolist()}"
    fingerprint = hashlib.sha256(meaning.encode()).hexdigest()
    return HeldOut(first.batch(places.tolist()), fingerprint, owners)


def held_from_refining(work: Work, spec: RefineSpec, proxies: Sequence[ProxySet]) -> Tensor:
    """Indices of the images that `pleas.refine` holds out when told which nothing learnt from."""
    count, seed = sum(map(len, proxies)), derive_seed(work.seed, "refine")
    share = share_held_out(count, spec.holdout)
    return split_off(count, share, seed, source_names(proxies), unused_images(work, proxies))[1]


def _owners(evidence: pleas.Evidence) -> Tensor | None:
    """(images,) the parent whose image each proxy is: as its source says, else by the fit of batch norms."""
    if evidence.parents.settings.heads == "separate":
        return None
    if evidence.given is not None:
        return evidence.given.argmax(1)
    return None if evidence.domains is None else evidence.domains.owners
