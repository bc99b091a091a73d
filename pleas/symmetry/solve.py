"""From the ledger to the tree of classes: which units are exchangeable?

1. Ids that are united become one unit; units that lie inside each other in a circle too.
2. A unit with children is a block. Blocks over the same leaves are one; crossing blocks (neither inside the other)
   are resolved by telling apart the smaller of the two families, block by block.
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

from pleas.symmetry.labels import Ledger, mix, salt_of

ROOT = -1


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
    colours = np.zeros(_count(unit_of), np.uint64)
    np.add.at(colours, unit_of, ledger.colours)
    unit_of, parent, colours = _laminar(ledger, unit_of, edges, colours)
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


# blocks ------------------------------------------------------------------------------------------------------


def _laminar(
    ledger: Ledger, unit_of: np.ndarray, edges: np.ndarray, colours: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make the blocks a tree: (unit of every id, parent of every unit, colours of every unit)."""
    leaves = _leaf_sets(edges)
    merged = _same_leaves(leaves, len(colours))
    if not np.array_equal(merged, np.arange(len(colours))):
        unit_of, edges = merged[unit_of], merged[edges]
        edges = np.unique(edges[:, edges[0] != edges[1]], axis=1)
        summed = np.zeros_like(colours)
        np.add.at(summed, merged, colours)
        colours = summed
        leaves = _leaf_sets(edges)
    family = _families(ledger, unit_of)
    while crossing := _crossing(leaves):
        for block in _smaller_family(crossing, family):
            inside = np.fromiter(leaves.pop(block), np.int64)
            with np.errstate(over="ignore"):
                colours[inside] += mix(np.uint64(salt_of(f"crossing {block}")))
                colours[block] += mix(np.uint64(salt_of(f"dissolved {block}")))
    parent = np.full(len(colours), ROOT)
    for leaf, chain in _chains(leaves).items():
        parent[[leaf, *chain[:-1]]] = chain
    return unit_of, parent, colours


def _leaf_sets(edges: np.ndarray) -> dict[int, frozenset[int]]:
    """Block -> the units without children below it."""
    children: dict[int, list[int]] = defaultdict(list)
    for child, parent in edges.T.tolist():
        children[parent].append(child)
    found: dict[int, frozenset[int]] = {}

    def below(unit: int) -> frozenset[int]:
        if unit not in children:
            return frozenset((unit,))
        if unit not in found:
            found[unit] = frozenset().union(*(below(c) for c in children[unit]))
        return found[unit]

    for unit in list(children):
        below(unit)
    return found


def _same_leaves(leaves: dict[int, frozenset[int]], count: int) -> np.ndarray:
    """Unit -> the one unit that stands for all with the same leaves."""
    keeper: dict[frozenset[int], int] = {}
    merged = np.arange(count)
    for block, inside in leaves.items():
        if len(inside) == 1:
            merged[block] = next(iter(inside))
        else:
            merged[block] = keeper.setdefault(inside, block)
    return merged


def _families(ledger: Ledger, unit_of: np.ndarray) -> dict[int, str]:
    """Unit -> the family of its first id (blocks made by one op, indices of one axis)."""
    firsts = np.array([first for first, _ in ledger.births])
    names = [name for _, name in ledger.births]
    units, ids = np.unique(unit_of, return_index=True)
    birth = np.searchsorted(firsts, ids, side="right") - 1
    return {int(u): names[b] for u, b in zip(units, birth, strict=True)}


def _chains(leaves: dict[int, frozenset[int]]) -> dict[int, list[int]]:
    """Leaf -> the blocks around it, smallest first."""
    around: dict[int, list[int]] = defaultdict(list)
    for block in sorted(leaves, key=lambda b: len(leaves[b])):
        for leaf in leaves[block]:
            around[leaf].append(block)
    return around


def _crossing(leaves: dict[int, frozenset[int]]) -> list[tuple[int, int]]:
    """Pairs of blocks that overlap, neither inside the other."""
    neighbours = {pair for chain in _chains(leaves).values() for pair in zip(chain, chain[1:], strict=False)}
    return sorted(pair for pair in neighbours if not leaves[pair[0]] <= leaves[pair[1]])


def _smaller_family(crossing: list[tuple[int, int]], family: dict[int, str]) -> list[int]:
    """Of the first two families that cross, the blocks of the one with fewer of them."""
    first, second = (family[block] for block in crossing[0])
    blocks: dict[str, set[int]] = defaultdict(set)
    for pair in crossing:
        for block in pair:
            blocks[family[block]].add(block)
    if first == second:
        return sorted(blocks[first])
    return sorted(min((blocks[first], blocks[second]), key=len))


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
