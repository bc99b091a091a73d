"""Rivals: other methods that make one network of several, from the same evidence; one file a family."""

from __future__ import annotations

from pleas.comparators.averages import ActivationMatching, Permutation, PlainAverage, WeightMatching
from pleas.comparators.comparator import Case, Comparator
from pleas.comparators.fisher import Fisher
from pleas.comparators.regmean import RegMean, RegMeanPlusPlus

METHODS: dict[str, type[Comparator]] = {
    "average": PlainAverage,
    "permutation": Permutation,
    "weight_matching": WeightMatching,
    "activation_matching": ActivationMatching,
    "regmean": RegMean,
    "regmean++": RegMeanPlusPlus,
    "fisher": Fisher,
}

__all__ = ["METHODS", "Case", "Comparator"]
