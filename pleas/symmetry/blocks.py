"""Blocks: units that have other units inside them, made a tree.

The ops say which unit moves inside which (child, parent). Two blocks over the same leaves are one. Two blocks that
cross, so that neither is inside the other, are resolved family against family (a family: blocks made by one op):

- each block of one family crosses only one of the other: it moves inside that one (a grouped convolution feeding
  another with fewer groups);
- otherwise (a channel shuffle, head dimensions shared by all heads) the group would be a product, acting on rows and
  columns of a grid. The family with fewer blocks is given up: its blocks colour what is inside them.

Both only make the group smaller.
"""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np

from pleas.symmetry.labels import Ledger, mix, salt_of

ROOT = -1
Leaves = dict[int, frozenset[int]]  # block -> the units without children below it


class Blocks:
    """The nesting of units. `tree()` settles it; `unit_of` and `colours` change on the way, as blocks merge."""

    def __init__(self, ledger: Ledger, unit_of: np.ndarray, edges: np.ndarray) -> None:
        """unit_of: id -> unit; edges: (child, parent) pairs of units, free of circles, shape (2, n)."""
        self.ledger, self.unit_of, self.edges = ledger, unit_of, edges
        self.colours = np.zeros(int(unit_of.max()) + 1 if len(unit_of) else 0, np.uint64)
        np.add.at(self.colours, unit_of, ledger.colours)

    def tree(self) -> np.ndarray:
        """Parent of every unit, ROOT where there is none."""
        leaves = self._merged()
        while crossing := _crossing(leaves):
            self._resolve(crossing)
            leaves = self._merged()
        parent = np.full(len(self.colours), ROOT)
        for leaf, chain in _chains(leaves).items():
            parent[[leaf, *chain[:-1]]] = chain
        return parent

    def _merged(self) -> Leaves:
        """Make blocks over the same leaves one, a block over a single leaf that leaf; returns the leaf sets."""
        leaves = _leaf_sets(self.edges)
        keeper: dict[frozenset[int], int] = {}
        merged = np.arange(len(self.colours))
        for block, inside in leaves.items():
            merged[block] = keeper.setdefault(inside, block) if len(inside) > 1 else next(iter(inside))
        if np.array_equal(merged, np.arange(len(merged))):
            return leaves
        summed = np.zeros_like(self.colours)
        np.add.at(summed, merged, self.colours)
        self.colours, self.unit_of = summed, merged[self.unit_of]
        self._set_edges(merged[self.edges])
        return _leaf_sets(self.edges)

    def _set_edges(self, edges: np.ndarray) -> None:
        self.edges = np.unique(edges[:, edges[0] != edges[1]], axis=1)

    def _resolve(self, crossing: list[tuple[int, int]]) -> None:
        """Settle all crossings between two families, those of the first pair."""
        family = self._families({block for pair in crossing for block in pair})
        one, other = sorted(family[block] for block in crossing[0])
        met: dict[str, dict[int, set[int]]] = {one: defaultdict(set), other: defaultdict(set)}
        for pair in crossing:
            if sorted(family[block] for block in pair) == [one, other]:
                for block, against in (pair, pair[::-1]):
                    met[family[block]][block].add(against)
        for name in (one, other) if one != other else ():
            if all(len(against) == 1 for against in met[name].values()):
                inside = [(block, next(iter(against))) for block, against in met[name].items()]
                self._set_edges(np.concatenate([self.edges, np.array(inside).T], 1))
                return
        for block in sorted(min(met.values(), key=len)):
            self._dissolve(block)

    def _dissolve(self, block: int) -> None:
        """Give up a block: what was inside is coloured by it and moves to the blocks around it."""
        child, parent = self.edges
        children, around = child[parent == block], parent[child == block]
        with np.errstate(over="ignore"):
            self.colours[children] += mix(np.uint64(salt_of(f"inside {block}")))
            self.colours[block] += mix(np.uint64(salt_of(f"alone {block}")))
        rest = self.edges[:, (child != block) & (parent != block)]
        bridges = np.stack([np.repeat(children, len(around)), np.tile(around, len(children))])
        self._set_edges(np.concatenate([rest, bridges], 1))

    def _families(self, blocks: set[int]) -> dict[int, str]:
        """Block -> what its first id was made for."""
        firsts = np.array([first for first, _ in self.ledger.births])
        units, ids = np.unique(self.unit_of, return_index=True)
        birth = np.searchsorted(firsts, ids, side="right") - 1
        first_birth = dict(zip(units.tolist(), birth.tolist(), strict=True))
        return {block: self.ledger.births[first_birth[block]][1] for block in blocks}


def _leaf_sets(edges: np.ndarray) -> Leaves:
    children: dict[int, list[int]] = defaultdict(list)
    for child, parent in edges.T.tolist():
        children[parent].append(child)
    found: Leaves = {}

    def below(unit: int) -> frozenset[int]:
        if unit not in children:
            return frozenset((unit,))
        if unit not in found:
            found[unit] = frozenset().union(*(below(c) for c in children[unit]))
        return found[unit]

    for unit in list(children):
        below(unit)
    return found


def _chains(leaves: Leaves) -> dict[int, list[int]]:
    """Leaf -> the blocks around it, smallest first."""
    around: dict[int, list[int]] = defaultdict(list)
    for block in sorted(leaves, key=lambda b: len(leaves[b])):
        for leaf in leaves[block]:
            around[leaf].append(block)
    return around


def _crossing(leaves: Leaves) -> list[tuple[int, int]]:
    """Pairs of blocks that overlap, neither inside the other (neighbours in a chain suffice to find one)."""
    pairs = {pair for chain in _chains(leaves).values() for pair in itertools.pairwise(chain)}
    return sorted(pair for pair in pairs if not leaves[pair[0]] <= leaves[pair[1]])
