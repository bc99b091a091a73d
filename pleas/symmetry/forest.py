"""From the ledger to the tree of classes: which units are exchangeable?

1. Ids that are united become one unit; units that lie inside each other in a circle too.
2. Units with children are blocks; they are made a tree (blocks.py).
3. What remains is a tree. From the leaves up, every unit gets a signature: its colours, and in index order what
   stands on each axis it touches. Siblings with equal signatures form one class.

Positions of exchanged units are paired in index order; the ordered signature makes sure that what is paired
looks alike.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from pleas.symmetry.blocks import ROOT, Blocks
from pleas.symmetry.labels import Ledger, mix


@dataclass
class Forest:
    """Units after solving, as arrays over units.

    unit_of: id -> unit      parent: unit -> enclosing block, ROOT if none
    classes: parent unit -> lists of exchangeable units, in index order
    """

    unit_of: np.ndarray
    parent: np.ndarray
    classes: dict[int, list[list[int]]]
    members: dict[int, np.ndarray]


def solve(ledger: Ledger) -> Forest:
    """Solve everything the ledger holds."""
    unit_of, edges = _units(ledger)
    blocks = Blocks(ledger, unit_of, edges)
    parent = blocks.tree()
    unit_of, colours = blocks.unit_of, blocks.colours
    signature = _signatures(ledger, unit_of, parent, colours)
    return Forest(unit_of, parent, _classes(ledger, unit_of, parent, signature), _members(unit_of))


def _members(unit_of: np.ndarray) -> dict[int, np.ndarray]:
    order = np.argsort(unit_of, kind="stable")
    units, starts = np.unique(unit_of[order], return_index=True)
    return dict(zip(units.tolist(), np.split(order, starts[1:]), strict=True))


def _units(ledger: Ledger) -> tuple[np.ndarray, np.ndarray]:
    """Unit of every id, and the distinct (child, parent) pairs of units, free of circles."""
    united = [np.stack(pair) for pair in ledger.unions]
    unit_of = _components(
        ledger.count, np.concatenate(united, 1) if united else np.zeros((2, 0), np.int64), "weak"
    )
    nested = [np.stack(pair) for pair in ledger.nestings]
    edges = np.concatenate(nested, 1) if nested else np.zeros((2, 0), np.int64)
    while True:
        mapped = unit_of[edges]
        mapped = np.unique(mapped[:, mapped[0] != mapped[1]], axis=1)
        circles = _components(_count(unit_of), mapped, "strong")
        if _count(circles) == _count(unit_of):
            return unit_of, mapped
        unit_of = circles[unit_of]


def _count(units: np.ndarray) -> int:
    return int(units.max()) + 1 if len(units) else 0


def _components(count: int, pairs: np.ndarray, connection: str) -> np.ndarray:
    graph = coo_matrix((np.ones(pairs.shape[1], np.int8), (pairs[0], pairs[1])), (count, count))
    return connected_components(graph, directed=True, connection=connection)[1]


# signatures --------------------------------------------------------------------------------------------------


def _signatures(ledger: Ledger, unit_of: np.ndarray, parent: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """A number per unit; equal numbers mean units that look alike from everywhere."""
    touched = [(np.arange(t.first, t.first + t.size), k) for k, t in enumerate(ledger.touches)]
    ids = np.concatenate([i for i, _ in touched]) if touched else np.zeros(0, np.int64)
    touch = np.concatenate([np.full(len(i), k) for i, k in touched]) if touched else ids
    signature = mix(colours)
    _add_in_order(signature, unit_of[ids], touch, ledger.colours[ids])
    height = _heights(parent)
    lowest = unit_of[ids]
    owner = lowest.copy()
    for level in range(1, int(height.max()) + 1 if len(height) else 0):
        climbing = True
        while climbing:  # up to the block of this height, if the chain has one
            up = np.where(owner >= 0, parent[owner], ROOT)
            step = (up >= 0) & (np.where(up >= 0, height[up], np.iinfo(np.int64).max) <= level)
            owner = np.where(step, up, owner)
            climbing = bool(step.any())
        here = height[owner] == level
        inner = here & (lowest != owner)
        _add_in_order(signature, owner[inner], touch[inner], signature[lowest[inner]])
        blocks = np.flatnonzero(height == level)
        kids = np.flatnonzero(np.isin(parent, blocks))
        with np.errstate(over="ignore"):
            np.add.at(signature, parent[kids], mix(signature[kids]))
    return signature


def _add_in_order(signature: np.ndarray, units: np.ndarray, touch: np.ndarray, what: np.ndarray) -> None:
    """Add to each unit a hash of what it finds on each touched axis, in index order (ids rise along an axis)."""
    order = np.lexsort((np.arange(len(units)), touch, units))
    units, touch, what = units[order], touch[order], what[order]
    new = np.ones(len(units), bool)
    new[1:] = (units[1:] != units[:-1]) | (touch[1:] != touch[:-1])
    starts = np.flatnonzero(new)
    rank = np.arange(len(units)) - np.repeat(starts, np.diff(np.append(starts, len(units))))
    with np.errstate(over="ignore"):
        place = mix(
            rank.astype(np.uint64) * np.uint64(1_000_003) + touch.astype(np.uint64) * np.uint64(7_368_787)
        )
        np.add.at(signature, units, mix(what ^ place))


def _heights(parent: np.ndarray) -> np.ndarray:
    height = np.zeros(len(parent), np.int64)
    for _ in range(64):  # deeper nesting than this does not occur: a chain of blocks at least doubles
        kids = np.flatnonzero(parent >= 0)
        before = height.copy()
        np.maximum.at(height, parent[kids], height[kids] + 1)
        if np.array_equal(before, height):
            break
    return height


def _classes(
    ledger: Ledger, unit_of: np.ndarray, parent: np.ndarray, signature: np.ndarray
) -> dict[int, list[list[int]]]:
    """Parent -> classes of its children, each in order of the first position of its units."""
    place = np.full(len(parent), np.iinfo(np.int64).max)
    for touch in ledger.touches:  # ids of an axis rise along it
        ids = np.arange(touch.first, touch.first + touch.size)
        np.minimum.at(place, unit_of[ids], ids)
    for _ in range(int(_heights(parent).max()) if len(parent) else 0):
        kids = np.flatnonzero(parent >= 0)
        np.minimum.at(place, parent[kids], place[kids])
    units = np.flatnonzero(place < np.iinfo(np.int64).max)
    units = units[np.argsort(place[units], kind="stable")]
    found: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for unit in units.tolist():
        found[int(parent[unit])][int(signature[unit])].append(unit)
    return {enclosing: list(by_signature.values()) for enclosing, by_signature in found.items()}
