"""Proxies that nothing learnt from: no layer was solved on them and no refining trained on them."""

from __future__ import annotations

import hashlib
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
    """(count,) True for proxies on which no layer is solved."""
    held = held_out(count, work.settings.holdout, work.settings.seed)
    return (
        held if bool(held.any()) else ~held
    )  # so few that every one is solved on: then on all, as the solve does


def hold_out(work: Work, proxies: ProxySet, evidence: pleas.Evidence) -> HeldOut:
    """The proxies on which every network of the run is compared with its parents."""
    unused, spec = unsolved(work, len(proxies)), work.recipe.recipe.refine
    if spec is not None:
        trained = torch.ones_like(unused)
        trained[held_from_refining(work, spec, proxies, unused)] = False
        unused &= ~trained
    places = unused.nonzero()[:, 0]
    if len(places) > MOST:
        places = places[torch.linspace(0, len(places) - 1, MOST).round().long()]
    owners = _owners(evidence)
    if owners is not None:
        owners = owners[places]
    meaning = f"{proxies.fingerprint} {places.tolist()} {None if owners is None else owners.tolist()}"
    fingerprint = hashlib.sha256(meaning.encode()).hexdigest()
    return HeldOut(proxies.batch(places.tolist()), fingerprint, owners)


def _owners(evidence: pleas.Evidence) -> Tensor | None:
    """(images,) the parent whose image each proxy is: as its source says, else by the fit of batch norms."""
    if evidence.parents.settings.heads == "separate":
        return None
    if evidence.given is not None:
        return evidence.given.argmax(1)
    return None if evidence.domains is None else evidence.domains.owners


def held_from_refining(work: Work, spec: RefineSpec, proxies: ProxySet, unused: Tensor) -> Tensor:
    """Indices of the proxies that `pleas.refine` holds out when told that `unused` are to be held out first."""
    share = share_held_out(len(proxies), spec.holdout)
    return split_off(len(proxies), share, derive_seed(work.seed, "refine"), proxies.source_names, unused)[1]
