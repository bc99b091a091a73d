"""Blocks: units that have other units inside them, made a tree.

The ops say which unit moves inside which (child, parent). Two blocks over the same leaves are one. Two blocks that
cross, so that neither is inside the other, are resolved family against family (a family: blocks made by one op):

- each block of one family crosses only one of the other: it moves inside that one (a grouped convolution feeding
  another with fewer groups);
- otherwise (a channel shuffle, head dimensions shared by all heads) the group would be a product, acting on rows and
  columns of a grid. One family is given up, its blocks only colour what is inside them: in attention the dimensions,
  so that heads are kept, elsewhere the family with fewer blocks.

Both only make the group smaller.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from pleas.symmetry.labels import BILINEAR, Ledger, mix, salt_of

ROOT = -1
Leaves = dict[int, frozenset[int]]  # block -> the units without children below it


class Blocks:
    """The nesting of units. `tree()` settles it; `unit_of` and `colours` change on the way, as blocks merge."""

    def __init__(self, ledger: Ledger, unit_of: np.ndarray, edges: np.ndarray) -> None:
        """unit_of: id -> unit; edges: (child, parent) pairs of units, free of circles, shape (2, n)."""
        self.ledger, self.unit_of = ledger, unit_of
        self.colours = np.zeros(int(unit_of.max()) + 1 if len(unit_of) else 0, np.uint64)
        np.add.at(self.colours, unit_of, ledger.colours)
        self.inside: dict[int, set[int]] = defaultdict(set)  # block -> what lies directly inside
        for child, parent in edges.T.tolist():
            self.inside[parent].add(child)
        multiplied = [ids for ids, reason in ledger.marks if reason == BILINEAR]
        self.bilinear = set(unit_of[np.concatenate([*multiplied, np.zeros(0, np.int64)])].tolist())

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
        leaves = self._leaf_sets()
        keeper: dict[frozenset[int], int] = {}
        merged = {}
        for block, below in leaves.items():
            keep = keeper.setdefault(below, block) if len(below) > 1 else next(iter(below))
            if keep != block:
                merged[block] = keep
        if not merged:
            return leaves
        target = np.arange(len(self.colours))
        target[list(merged)] = list(merged.values())
        summed = np.zeros_like(self.colours)
        np.add.at(summed, target, self.colours)
        self.colours, self.unit_of = summed, target[self.unit_of]
        inside: dict[int, set[int]] = defaultdict(set)
        for block, children in self.inside.items():
            block = merged.get(block, block)
            inside[block] |= {merged.get(child, child) for child in children} - {block}
        self.inside = defaultdict(set, {block: children for block, children in inside.items() if children})
        return {block: below for block, below in leaves.items() if block not in merged}

    def _leaf_sets(self) -> Leaves:
        found: Leaves = {}

        def below(unit: int) -> frozenset[int]:
            if unit not in self.inside:
                return frozenset((unit,))
            if unit not in found:
                found[unit] = frozenset().union(*map(below, self.inside[unit]))
            return found[unit]

        for unit in list(self.inside):
            below(unit)
        return found

    def _resolve(self, crossing: list[tuple[int, int]]) -> None:
        """Settle the crossings family against family, each family at most once."""
        family = self._families({block for pair in crossing for block in pair})
        met: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
        for a, b in crossing:
            met[tuple(sorted((family[a], family[b])))].append((a, b) if family[a] <= family[b] else (b, a))  # type: ignore[index]
        settled: set[str] = set()
        for names, pairs in sorted(met.items()):
            if settled.isdisjoint(names):
                settled |= set(names)
                self._settle(pairs)

    def _settle(self, pairs: list[tuple[int, int]]) -> None:
        """One family (first of each pair) against another: move inside if that is unique, else give one up."""
        sides: list[dict[int, set[int]]] = [defaultdict(set), defaultdict(set)]
        for a, b in pairs:
            sides[0][a].add(b)
            sides[1][b].add(a)
        if sides[0].keys().isdisjoint(sides[1].keys()):
            for side in sides:
                if all(len(against) == 1 for against in side.values()):
                    for block, against in side.items():
                        self.inside[next(iter(against))].add(block)
                    return
        few, many = sorted(sides, key=len)
        attention = self.bilinear.intersection(*(self.inside[block] for block in pairs[0]))
        self._dissolve((many if attention else few).keys())

    def _dissolve(self, blocks: Iterable[int]) -> None:
        """Give up blocks: what was inside is coloured by them and moves to the blocks around."""
        gone = sorted(blocks)
        around: dict[int, list[int]] = defaultdict(list)
        for outer, children in self.inside.items():
            for block in children.intersection(gone):
                around[block].append(outer)
        for block in gone:
            children = self.inside.pop(block)
            members = list(children)
            with np.errstate(over="ignore"):
                self.colours[members] += mix(np.uint64(salt_of(f"inside {block}")))
                self.colours[block] += mix(np.uint64(salt_of(f"alone {block}")))
            for outer in around[block]:
                if outer not in self.inside:
                    continue  # given up before; its own outer blocks are in the list
                self.inside[outer].discard(block)
                self.inside[outer] |= children
                for child in children.intersection(gone):
                    around[child].append(outer)

    def _families(self, blocks: set[int]) -> dict[int, str]:
        """Block -> what its first id was made for."""
        firsts = np.array([first for first, _ in self.ledger.births])
        units, ids = np.unique(self.unit_of, return_index=True)
        birth = np.searchsorted(firsts, ids, side="right") - 1
        first_birth = dict(zip(units.tolist(), birth.tolist(), strict=True))
        return {block: self.ledger.births[first_birth[block]][1] for block in blocks}


def _chains(leaves: Leaves) -> dict[int, list[int]]:
    """Leaf -> the blocks around it, smallest first."""
    around: dict[int, list[int]] = defaultdict(list)
    for block in sorted(leaves, key=lambda b: len(leaves[b])):
        for leaf in leaves[block]:
            around[leaf].append(block)
    return around


def _crossing(leaves: Leaves) -> list[tuple[int, int]]:
    """All pairs of blocks that overlap, neither inside the other; a family is settled by the whole of them."""
    pairs = {pair for chain in _chains(leaves).values() for pair in itertools.combinations(chain, 2)}
    return sorted(pair for pair in pairs if not leaves[pair[0]] <= leaves[pair[1]])
