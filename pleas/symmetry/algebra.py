"""The three things an op can do to values: meet element by element, reduce dimensions, move elements around.

A contraction (matrix product, convolution, attention) is a meeting followed by a reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from pleas.symmetry.labels import (
    Ledger,
    Shape,
    Val,
    canonical,
    distinct,
    joint,
    mix,
    pairs,
    positions,
    relate,
    salt_of,
    squash,
    tell_apart,
    varying,
)


class Algebra:
    """Values and their meetings, within one op; `name` salts colours and `reason` explains pins."""

    def __init__(self, ledger: Ledger, name: str, reason: str) -> None:
        self.ledger, self.name, self.salt, self.reason = ledger, name, salt_of(name), reason

    # meeting -----------------------------------------------------------------------------------------------

    def meet(self, values: Sequence[Val], shape: Shape) -> Val:
        """An element-wise op on values that broadcast to `shape`."""
        ndim = len(shape)
        free: list[Tensor] = []
        fixed: list[Tensor] = []
        for value in values:
            mine = [_lift(label, ndim) for label in value.free]
            for label in mine:
                self._add(free, label)
            fixed += [_lift(label, ndim) for label in value.fixed]
        return self.settle(Val(shape, free, fixed))

    def _add(self, free: list[Tensor], label: Tensor) -> None:
        """Relate one more free label to those already there; a duplicate is dropped."""
        for k, other in enumerate(free):
            if other is label or (other.shape == label.shape and torch.equal(other, label)):
                return
            if relate(self.ledger, other, label, self.name) == "same":
                if varying(label) == varying(other):
                    free[k] = torch.where(other < 0, label, other)
                return
        free.append(label)

    def settle(self, value: Val) -> Val:
        """Confront free labels with fixed ones, and drop what the others say already."""
        fixed = compact(value.shape, value.fixed)
        free = []
        for label in value.free:
            pinned = tell_apart(self.ledger, label, fixed, self.salt, self.reason)
            if not pinned and varying(label):
                free.append(label)
        fixed = [f for f in fixed if not any(_determines(label, f) for label in free)]
        return Val(value.shape, free, fixed, value.const)

    # reducing ----------------------------------------------------------------------------------------------

    def reduce(self, value: Val, dims: Iterable[int], keepdim: bool = False) -> Val:
        """A symmetric reduction (sum, mean, max, ...) over dims.

        A label inside the reduced dims is gone. A label across them and others leaves behind, at each remaining
        place, the block of the ids that were reduced there; equal sets of ids make one block.
        """
        ndim = len(value.shape)
        gone = sorted({d % ndim for d in dims}) if ndim else []
        kept = [label for label in value.free if not varying(label) & set(gone)]
        blocks = [b for label in value.free if (b := self._blocks(label, gone)) is not None]
        free: list[Tensor] = []
        for label in kept + blocks:
            self._add_coarse(free, label)
        fixed = [r for label in value.fixed if (r := _collapse(label, gone)) is not None]
        shape = tuple(1 if d in gone else size for d, size in enumerate(value.shape))
        result = Val(shape, free, compact(shape, fixed))
        return result if keepdim else drop_dims(result, gone)

    def _blocks(self, label: Tensor, gone: Sequence[int]) -> Tensor | None:
        if not varying(label) & set(gone) or varying(label) <= set(gone):
            return None
        keys = _fibre_keys(label, gone)
        if distinct(keys) == 1:
            return None
        places = canonical(keys)
        ids = self.ledger.fresh(int(places.max()) + 1, self.name)
        blocks = ids[places]
        child, parent = pairs(label, blocks)
        self.ledger.nest(child, parent)
        return blocks

    def _add_coarse(self, free: list[Tensor], label: Tensor) -> None:
        """Like _add, but a label that is coarser than one already there says nothing new."""
        for other in free:
            if relate(self.ledger, other, label, self.name) in ("same", "a finer"):
                return
        free.append(label)

    # moving ------------------------------------------------------------------------------------------------

    def reshaped(self, value: Val, shape: Shape) -> Val:
        return reshape(value, shape)

    def transposed(self, value: Val) -> Val:
        """The last two dimensions exchanged."""
        shape = (*value.shape[:-2], value.shape[-1], value.shape[-2])
        return move(value, shape, lambda t: t.transpose(-1, -2))

    # pinning -----------------------------------------------------------------------------------------------

    def pin(self, value: Val, reason: str) -> None:
        """Fix everything the value depends on."""
        for label in value.free:
            self.ledger.pin(label, self.salt, reason)

    def see(self, value: Val, part: int = 0) -> Val:
        """Tell the units found in this value apart from all others (a slice, one piece of a split)."""
        for k, label in enumerate(value.free):
            ids = label.reshape(-1)
            colour = mix(np.uint64((self.salt + 7919 * part + k) & (2**63 - 1)))
            self.ledger.colour(ids[ids >= 0], colour)
        return value


# moving ------------------------------------------------------------------------------------------------------


def move(value: Val, shape: Shape, op: Callable[[Tensor], Tensor], dims: Iterable[int] = ()) -> Val:
    """Run a shape op on every label. `dims` are those whose extent the op needs to see."""
    wanted = {d % len(value.shape) for d in dims}

    def one(label: Tensor) -> Tensor:
        extent = [value.shape[d] if d in wanted else label.shape[d] for d in range(label.dim())]
        return squash(op(label.expand(extent)))

    return Val(shape, [one(label) for label in value.free], [canonical(one(f)) for f in value.fixed])


def reshape(value: Val, shape: Shape) -> Val:
    """`view`, group by group of dimensions, so that only labels that vary within a group are materialised."""
    groups = _dim_groups(value.shape, shape)

    def one(label: Tensor) -> Tensor:
        before, after = [], []
        for old, new in groups:
            needed = any(label.shape[d] > 1 for d in old)
            before += [value.shape[d] if needed else 1 for d in old]
            after += [shape[d] if needed else 1 for d in new]
        return squash(label.expand(before).reshape(after))

    return Val(shape, [one(label) for label in value.free], [canonical(one(f)) for f in value.fixed])


def drop_dims(value: Val, dims: Sequence[int]) -> Val:
    """Remove dimensions of size 1."""

    def one(label: Tensor) -> Tensor:
        return label.reshape([size for d, size in enumerate(label.shape) if d not in dims])

    shape = tuple(size for d, size in enumerate(value.shape) if d not in dims)
    return Val(shape, [one(label) for label in value.free], [one(label) for label in value.fixed])


def anonymous(shape: Shape) -> Val:
    """A value about which nothing is known: every position is fixed."""
    return Val(tuple(shape), [], positions(shape))


def _dim_groups(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """The finest pairing of consecutive old and new dimensions with equal products."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        olds, news, left, right = [], [], 1, 1
        if i < len(old):
            olds, left, i = [i], old[i], i + 1
        if j < len(new) and (left != 1 or not olds):
            news, right, j = [j], new[j], j + 1
        while left != right:
            if left < right:
                olds, left, i = [*olds, i], left * old[i], i + 1
            else:
                news, right, j = [*news, j], right * new[j], j + 1
        groups.append((olds, news))
    return groups


def _lift(label: Tensor, ndim: int) -> Tensor:
    return label.reshape((1,) * (ndim - label.dim()) + tuple(label.shape))


def compact(shape: Shape, labels: Iterable[Tensor]) -> list[Tensor]:
    """The same information in fewer fixed labels.

    Labels that vary on a subset of another's dimensions are joined with it. Once a label tells all positions of its
    dimensions apart, plain positions along each of them say the same, and everything else there is redundant.
    """
    told: set[int] = set()  # dimensions whose positions are all told apart
    left = [label for label in labels if varying(label)]
    joints: list[Tensor] = []
    while left:
        left = [label for label in left if not varying(label) <= told]
        widest = max((varying(label) for label in left), key=len, default=frozenset())
        inside = [label for label in left if varying(label) <= widest]
        if not inside:
            break
        left = [label for label in left if not varying(label) <= widest]
        whole = joint(inside)
        if distinct(whole) == whole.numel() and all(whole.shape[d] == shape[d] for d in widest):
            told |= widest
        else:
            joints.append(whole)
    return positions(shape, sorted(told)) + [label for label in joints if not varying(label) <= told]


def _determines(label: Tensor, position: Tensor) -> bool:
    """Whether knowing the id tells the position."""
    if not varying(position) <= varying(label) or bool((label < 0).any()):
        return False
    ids, _ = pairs(label, position)
    return len(ids) == distinct(label)


def _fibre_keys(label: Tensor, gone: Sequence[int]) -> Tensor:
    """A hash of the multiset of labels reduced at each remaining place (reduced dims have size 1)."""
    values = mix(label.numpy().astype(np.uint64)).view(np.int64)
    values[label.numpy() < 0] = 0
    inside = [d for d in gone if label.shape[d] > 1]
    return torch.from_numpy(values).sum(inside, keepdim=True) if inside else torch.from_numpy(values)


def _collapse(label: Tensor, gone: Sequence[int]) -> Tensor | None:
    """What a fixed label still tells after a reduction."""
    if not varying(label) & set(gone):
        return label
    rest = canonical(_fibre_keys(label, gone))
    rest = squash(rest)
    return rest if varying(rest) else None
