"""What the second moments of a set of proxies can and cannot say: rank, and stability of the matching."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import pleas
from pleas.symmetry import Permutation, UnitPermutation

_DEAD = 1e-4  # eigenvalues below this share of the largest are directions the proxies hardly excite


@dataclass(frozen=True)
class Rank:
    """Directions of one parent's inputs to one layer.

    effective: exp of the entropy of the covariance's normalised eigenvalues, between 1 and `size`
    dead:      eigenvalues below 1e-4 of the largest
    """

    layer: str
    size: int
    effective: float
    dead: int


def ranks(networks: pleas.Parents, statistics: pleas.Statistics) -> list[list[Rank]]:
    """Per parent and layer, from the covariance of the layer's input units; those with too many are left out."""
    found: list[list[Rank]] = [[] for _ in networks.names]
    for layer in networks.layers:
        moments = statistics.units.get((layer.weight, 1))
        if moments is None:
            continue
        blocks = moments.covariance[0].unflatten(0, (networks.count, -1)).unflatten(2, (networks.count, -1))
        for parent, ranked in enumerate(found):
            values = torch.linalg.eigvalsh(blocks[parent, :, parent].double()).clamp_min(0)
            shares = values / values.sum().clamp_min(1e-300)
            entropy = -(shares * shares.clamp_min(1e-300).log()).sum()
            dead = int((values <= _DEAD * values.max()).sum())
            ranked.append(Rank(layer.name, len(values), float(entropy.exp()), dead))
    return found


def shared_assignments(symmetry: pleas.Symmetry, one: Permutation, two: Permutation) -> float:
    """Share of units that both matchings pair alike, output units left out; a unit with inner units counts those."""
    same, total = 0, 0
    for index, (first, second) in enumerate(zip(one, two, strict=True)):
        if index not in symmetry.output:
            alike, units = _compare(first, second)
            same, total = same + alike, total + units
    return same / total if total else 1.0


def _compare(one: UnitPermutation, two: UnitPermutation) -> tuple[int, int]:
    alike = one.perm == two.perm
    if not one.children:
        return int(alike.sum()), len(alike)
    same, total = 0, 0
    for equal, first, second in zip(alike.tolist(), one.children, two.children, strict=True):
        for child, other in zip(first, second, strict=True):
            inner, units = _compare(child, other)
            same, total = same + (inner if equal else 0), total + units
    return same, total
