"""Index labels: which unit does each element of a value belong to?

Every value of the graph carries *label tensors* of its own shape. A label tensor is either

- free:  an int64 id per element, the *unit* it belongs to. Ids are born on the axes of parameters, one per
         index; -1 marks neutral elements (padding), which belong to any unit.
- fixed: an int64 position per element that no symmetry may change: rows of the batch, image positions, the
         input's channels, positions of a constant.

The one invariant: **elements that agree in all labels of a value are equal**. Shape ops are therefore simply
executed on the labels, and nothing needs to be known about a value beyond them. Labels are stored with size 1
along every dimension they do not vary on.

What the ops find out about ids is only recorded here, in four lists, and solved at the very end (solve.py):

- unite:  two ids are one unit (they move together);
- nest:   a child id moves inside, or together with, its parent id (head dimension in head, channel in group);
- colour: an id has been told apart; ids of different colours are never exchanged. A unique colour pins;
- mark:   why a unit cannot be kept partly apart by widening.

Ids in label tensors never change, so no label can silently vanish because of what another op found out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

Shape = tuple[int, ...]
BILINEAR = "two activations are multiplied and summed over it"  # a mark that also tells attention heads
_SHIFT = 1 << 31  # ids stay below it, so that a pair of ids fits one int64


@dataclass
class Val:
    """What is known about one value of the graph; `const` holds its numbers where they are known."""

    shape: Shape
    free: list[Tensor] = field(default_factory=list)
    fixed: list[Tensor] = field(default_factory=list)
    const: Tensor | None = None


@dataclass(frozen=True)
class Touch:
    """Ids born on one axis of one parameter: id `first + i` stands for index i.

    groups > 1: the inner axis of a grouped convolution, taken as the virtual axis of all input channels.
    """

    tensor: str
    dim: int
    first: int
    size: int
    groups: int = 1


class Ledger:
    """Births of ids and everything the ops find out about them."""

    def __init__(self) -> None:
        self.count = 0
        self.touches: list[Touch] = []
        self.unions: list[tuple[np.ndarray, np.ndarray]] = []
        self.nestings: list[tuple[np.ndarray, np.ndarray]] = []
        self.births: list[tuple[int, str]] = []  # (first id, family) in order of birth
        self.marks: list[tuple[np.ndarray, str]] = []
        self.reasons: list[str] = [""]
        self._colours = np.zeros(1024, np.uint64)
        self._reason = np.zeros(1024, np.int32)

    # births ------------------------------------------------------------------------------------------------

    def fresh(self, count: int, family: str) -> Tensor:
        """`count` new ids; `family` names what they have in common (used to resolve crossing blocks)."""
        first, self.count = self.count, self.count + count
        while self.count > len(self._colours):
            self._colours = np.concatenate([self._colours, np.zeros_like(self._colours)])
            self._reason = np.concatenate([self._reason, np.zeros_like(self._reason)])
        self.births.append((first, family))
        return torch.arange(first, self.count)

    def born_on(self, tensor: str, dim: int, size: int, groups: int = 1) -> Tensor:
        """New ids for the indices of a parameter's axis, coloured by that axis."""
        ids = self.fresh(size, f"{tensor}:{dim}")
        self.touches.append(Touch(tensor, dim, int(ids[0]) if size else self.count, size, groups))
        self.colour(ids, salt_of(f"{tensor}:{dim}"))
        return ids

    # findings ----------------------------------------------------------------------------------------------

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        different = a != b
        if different.any():
            self.unions.append((a[different], b[different]))

    def nest(self, child: np.ndarray, parent: np.ndarray) -> None:
        self.nestings.append((child, parent))

    def colour(self, ids: Tensor | np.ndarray, colours: int | np.ndarray, reason: str = "") -> None:
        """Add colours to ids; colours add up, so that their order does not matter (multiset hash)."""
        array = np.asarray(ids).reshape(-1)
        values = np.broadcast_to(np.asarray(colours, np.uint64), array.shape)
        np.add.at(self._colours, array, mix(values))
        if reason:
            if self.reasons[-1] != reason:
                self.reasons.append(reason)
            unset = array[self._reason[array] == 0]
            self._reason[unset] = len(self.reasons) - 1

    def pin(self, ids: Tensor, salt: int, reason: str) -> None:
        """Give every id a colour of its own: it will not be exchanged with any other."""
        array = np.unique(np.asarray(ids))
        array = array[array >= 0]
        self.colour(array, mix(array.astype(np.uint64)) + np.uint64(salt), reason)

    def mark(self, labels: Iterable[Tensor], reason: str) -> None:
        for tensor in labels:
            ids = np.unique(tensor.numpy())
            self.marks.append((ids[ids >= 0], reason))

    @property
    def colours(self) -> np.ndarray:
        return self._colours[: self.count]

    def reason_of(self, ids: np.ndarray) -> str:
        found = self._reason[ids]
        return self.reasons[int(found[found > 0][0])] if (found > 0).any() else ""


# label tensors -----------------------------------------------------------------------------------------------


def varying(label: Tensor) -> frozenset[int]:
    """The dimensions a (squashed) label varies on."""
    return frozenset(d for d, size in enumerate(label.shape) if size > 1)


def squash(label: Tensor) -> Tensor:
    """Size 1 along every dimension the label does not vary on."""
    for d, size in enumerate(label.shape):
        if size > 1:
            head = label.narrow(d, 0, 1)
            if label.stride(d) == 0 or bool((label == head).all()):
                label = head
    return label


def along(labels: Tensor, dim: int, ndim: int) -> Tensor:
    """A 1-d label laid along one dimension of an ndim-dimensional value."""
    return labels.reshape([-1 if d == dim else 1 for d in range(ndim)])


def positions(shape: Sequence[int], dims: Iterable[int] | None = None) -> list[Tensor]:
    """Fixed labels, one per dimension (all dimensions by default): every index is told apart."""
    chosen = range(len(shape)) if dims is None else dims
    return [along(torch.arange(shape[d]), d, len(shape)) for d in chosen if shape[d] > 1]


def canonical(label: Tensor) -> Tensor:
    """Fixed labels renumbered 0, 1, ... in order of size, so that equal partitions compare equal."""
    return torch.unique(label, return_inverse=True)[1].reshape(label.shape)


def distinct(label: Tensor) -> int:
    return int(torch.unique(label).numel())


def pairs(a: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The distinct pairs of labels that meet in one element; neutral elements left out."""
    a, b = torch.broadcast_tensors(a, b)
    keys = (a * _SHIFT + b)[(a >= 0) & (b >= 0)].unique().numpy()
    return keys >> 31, keys & (_SHIFT - 1)


# hashing -----------------------------------------------------------------------------------------------------


def mix(values: np.ndarray | np.uint64) -> np.ndarray:
    """A 64-bit finaliser (SplitMix64, Steele et al. 2014): spreads integers over all bits."""
    with np.errstate(over="ignore"):
        z = np.asarray(values, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def salt_of(text: str) -> int:
    """A 63-bit number for a name, the same in every process (Python's hash is not)."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value >> 1


# relations ---------------------------------------------------------------------------------------------------


def relate(ledger: Ledger, a: Tensor, b: Tensor, family: str) -> str:
    """Record what two free labels of one value imply for each other.

    The symmetry has to preserve the set of pairs (a, b) that meet in an element. Returns how they compare:
    "same" (one to one: united), "a finer" / "b finer" (nested), "independent" (all pairs occur, no condition),
    "mixed" (independent inside the components of the pair graph, which become blocks).
    """
    if not varying(a) & varying(b):
        return "independent"
    left, right = pairs(a, b)
    n_left, n_right = len(np.unique(left)), len(np.unique(right))
    if len(left) == n_left == n_right:
        ledger.unite(left, right)
        return "same"
    if len(left) == n_left * n_right:
        return "independent"
    if len(left) == n_left:
        ledger.nest(left, right)
        return "a finer"
    if len(left) == n_right:
        ledger.nest(right, left)
        return "b finer"
    _blocks_of_pairs(ledger, left, right, family)
    return "mixed"


def _blocks_of_pairs(ledger: Ledger, left: np.ndarray, right: np.ndarray, family: str) -> None:
    """One block per connected component of the pair graph; a component that is no full product moves as one."""
    lefts, i = np.unique(left, return_inverse=True)
    rights, j = np.unique(right, return_inverse=True)
    nodes = len(lefts) + len(rights)
    graph = coo_matrix((np.ones(len(i), np.int8), (i, j + len(lefts))), (nodes, nodes))
    count, component = connected_components(graph, directed=False)
    blocks = ledger.fresh(count, family).numpy()
    met = np.bincount(component[i], minlength=count)
    full = np.bincount(component[: len(lefts)], minlength=count) * np.bincount(
        component[len(lefts) :], minlength=count
    )
    ids = np.concatenate([lefts, rights])
    product = (met == full)[component]
    ledger.nest(ids[product], blocks[component[product]])
    ledger.unite(ids[~product], blocks[component[~product]])


def tell_apart(ledger: Ledger, label: Tensor, fixed: Sequence[Tensor], salt: int, reason: str) -> bool:
    """Colour the ids of a free label by the positions they stand on; True when positions determine the id."""
    own = varying(label)
    inside = [f for f in fixed if varying(f) and varying(f) <= own]
    across = [f for f in fixed if varying(f) & own and not varying(f) <= own]
    determined = False
    for k, position in enumerate(([joint(inside)] if inside else []) + across):
        ids, where = pairs(label, position)
        n_ids, n_where = len(np.unique(ids)), len(np.unique(where))
        if len(ids) == n_ids * n_where:
            continue
        with np.errstate(over="ignore"):
            ledger.colour(ids, mix(where.astype(np.uint64)) + np.uint64(salt + k), reason)
        determined = determined or len(ids) == n_where
    return determined


def joint(labels: Sequence[Tensor]) -> Tensor:
    """One label that tells apart what any of the labels tells apart."""
    whole = labels[0]
    for label in labels[1:]:
        if label.shape != whole.shape or not torch.equal(label, whole):
            whole = canonical(whole * (int(label.max()) + 1) + label)
    return whole
