"""Means of the parents' weights: their units as they come, and matched in three ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pleas.comparators.comparator import Case, Need, State
from pleas.comparators.one_size import Canvas, OneSize, in_order
from pleas.evidence import Evidence


@dataclass(frozen=True)
class PlainAverage(OneSize):
    """The mean of the parents' weights, units as they come (model soups, arXiv 2203.05482, uniform soup)."""

    title: ClassVar[str] = "plain average"

    def align(self, case: Case) -> Evidence:
        return in_order(case.evidence, "none")

    def merge(self, canvas: Canvas, case: Case) -> State:
        return {}


@dataclass(frozen=True)
class Permutation(OneSize):
    """The mean of the parents' weights, units matched as the recipe matches them."""

    title: ClassVar[str] = "permutation only"
    needs: ClassVar[frozenset[Need]] = frozenset({"matching"})

    def merge(self, canvas: Canvas, case: Case) -> State:
        return {}


@dataclass(frozen=True)
class WeightMatching(OneSize):
    """The mean of weights matched by the weights alone (Git Re-Basin, arXiv 2209.04836, alg. 1).

    From three parents on all are matched in turn to the sum of the others (MergeMany, alg. 3).
    """

    title: ClassVar[str] = "weight matching"

    def align(self, case: Case) -> Evidence:
        return in_order(case.evidence, "weights")

    def merge(self, canvas: Canvas, case: Case) -> State:
        return {}


@dataclass(frozen=True)
class ActivationMatching(OneSize):
    """The mean of weights matched by correlations of units (Li et al., arXiv 1511.07543; REPAIR, arXiv 2211.08403)."""

    title: ClassVar[str] = "activation matching"
    needs: ClassVar[frozenset[Need]] = frozenset({"statistics"})

    def align(self, case: Case) -> Evidence:
        return in_order(case.evidence, "activations")

    def merge(self, canvas: Canvas, case: Case) -> State:
        return {}
