"""Permutations of units: drawing them, and applying them to positions and state dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pleas.symmetry.groups import Symmetry, UnitClass


@dataclass(frozen=True)
class UnitPermutation:
    """perm[u] is the unit of B that takes place u of A; children[u] permutes inside that place, per inner class."""

    perm: Tensor
    children: tuple[tuple[UnitPermutation, ...], ...] = ()


Permutation = tuple[UnitPermutation, ...]  # one for each top-level class


def identity(symmetry: Symmetry) -> Permutation:
    """The permutation that leaves everything in place."""
    return tuple(_draw(cls, None) for cls in symmetry.classes)


def compose(first: Permutation, second: Permutation) -> Permutation:
    """`first` finds the units of a middle network for every place, `second` those of a third for every unit of the
    middle one: the third's units for every place."""
    return tuple(_compose(x, y) for x, y in zip(first, second, strict=True))


def _compose(first: UnitPermutation, second: UnitPermutation) -> UnitPermutation:
    children = tuple(
        tuple(_compose(x, y) for x, y in zip(inner, second.children[int(middle)], strict=True))
        for middle, inner in zip(first.perm, first.children, strict=False)
    )
    return UnitPermutation(second.perm[first.perm], children)


def inverse(permutation: Permutation) -> Permutation:
    """The permutation that puts units back."""
    return tuple(_inverse(one) for one in permutation)


def _inverse(one: UnitPermutation) -> UnitPermutation:
    back = one.perm.argsort()
    children = tuple(inverse(one.children[int(place)]) for place in back) if one.children else ()
    return UnitPermutation(back, children)


def random(symmetry: Symmetry, generator: torch.Generator, only: Sequence[int] | None = None) -> Permutation:
    """A random permutation of every class, inner classes included; classes of the output stay in place.

    only: indices of the classes to permute (all but the output by default).
    """
    chosen = set(range(len(symmetry.classes))) - set(symmetry.output) if only is None else set(only)
    return tuple(_draw(cls, generator if k in chosen else None) for k, cls in enumerate(symmetry.classes))


def _draw(cls: UnitClass, generator: torch.Generator | None) -> UnitPermutation:
    perm = torch.arange(cls.size) if generator is None else torch.randperm(cls.size, generator=generator)
    return UnitPermutation(perm, tuple(tuple(_draw(c, generator) for c in inner) for inner in cls.children))


def position_maps(symmetry: Symmetry, permutation: Permutation) -> dict[tuple[str, int], Tensor]:
    """(tensor, dim) -> map with aligned_b = b.index_select(dim, map); axes that stay in place are left out.

    For dim 1 of a grouped convolution's weight the map is over the virtual axis of all channels.
    """
    maps: dict[tuple[str, int], Tensor] = {}
    for cls, part in zip(symmetry.classes, permutation, strict=True):
        _fill(symmetry, maps, cls, cls, part)
    return {key: m for key, m in maps.items() if not torch.equal(m, torch.arange(len(m)))}


def _fill(
    symmetry: Symmetry,
    maps: dict[tuple[str, int], Tensor],
    place: UnitClass,
    source: UnitClass,
    permutation: UnitPermutation,
) -> None:
    """`place` is a class as it stands in A, `source` the same class in the unit of B that comes there."""
    for here, there in zip(place.axes, source.axes, strict=True):
        key = (here.tensor, here.dim)
        if key not in maps:
            maps[key] = torch.arange(len(symmetry.axis(*key).cls))
        maps[key][here.index] = there.index[permutation.perm]
    for u, inner in enumerate(permutation.children):
        origin = source.children[int(permutation.perm[u])]
        for a, b, part in zip(place.children[u], origin, inner, strict=True):
            _fill(symmetry, maps, a, b, part)


def permute_state(
    symmetry: Symmetry, state: Mapping[str, Tensor], permutation: Permutation
) -> dict[str, Tensor]:
    """A state dict of the same function with its units permuted; tensors that stay in place are shared."""
    maps = position_maps(symmetry, permutation)
    return {name: permute_tensor(symmetry, maps, name, tensor) for name, tensor in state.items()}


def permute_tensor(
    symmetry: Symmetry, maps: Mapping[tuple[str, int], Tensor], name: str, tensor: Tensor
) -> Tensor:
    """One tensor of a state dict under the maps of `position_maps`."""
    name = symmetry.program.tied.get(name, name)
    groups = symmetry.groups.get(name, 1)
    for dim in range(tensor.dim()):
        places = maps.get((name, dim))
        if places is not None and dim == 1 and groups > 1:
            tensor = _gather_grouped(tensor, places, groups)
        elif places is not None:
            tensor = tensor.index_select(dim, places.to(tensor.device))
    return tensor


def _gather_grouped(weight: Tensor, places: Tensor, groups: int) -> Tensor:
    """Permute the inner axis of a grouped weight whose rows are in their new order already.

    places is over the virtual axis (group, index): at each group's place, all from one group of the source. The rows
    of that group have come to the same place, so only the index within the group is left to gather.
    """
    inner, per_group = weight.shape[1], weight.shape[0] // groups
    within = (places.reshape(groups, inner) % inner).repeat_interleave(per_group, 0)
    index = within.reshape(*weight.shape[:2], *(1,) * (weight.dim() - 2))
    return weight.gather(1, index.to(weight.device).expand(weight.shape))
