"""Rivals: other methods that make one network of several, from the same evidence; one file a family."""

from __future__ import annotations

from pleas.comparators.averages import ActivationMatching, Permutation, PlainAverage, WeightMatching
from pleas.comparators.cca import CCAMerge
from pleas.comparators.comparator import Case, Comparator
from pleas.comparators.cycles import C2M3
from pleas.comparators.distilling import Distillation
from pleas.comparators.fisher import Fisher
from pleas.comparators.learned import AdaMerging, ConcreteMask, FwMerging
from pleas.comparators.masks import Consensus, PcbMerging, Widen
from pleas.comparators.matching import MuDSC, StraightThrough
from pleas.comparators.regmean import RegMean, RegMeanPlusPlus
from pleas.comparators.solving import NeuronInterpolation, PublishedPLeaS
from pleas.comparators.subspace import Doge, IsoC, TsvMerge, Wudi
from pleas.comparators.task_vectors import Breadcrumbs, Dare, Lines, Slerp, TaskArithmetic, Ties
from pleas.comparators.zipit import ZipIt

METHODS: dict[str, type[Comparator]] = {
    "average": PlainAverage,
    "permutation": Permutation,
    "weight_matching": WeightMatching,
    "activation_matching": ActivationMatching,
    "regmean": RegMean,
    "regmean++": RegMeanPlusPlus,
    "fisher": Fisher,
    "zipit": ZipIt,
    "mudsc": MuDSC,
    "cca": CCAMerge,
    "c2m3": C2M3,
    "straight_through": StraightThrough,
    "neuron_interpolation": NeuronInterpolation,
    "pleas_published": PublishedPLeaS,
    "distillation": Distillation,
    "slerp": Slerp,
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare": Dare,
    "breadcrumbs": Breadcrumbs,
    "lines": Lines,
    "pcb": PcbMerging,
    "consensus": Consensus,
    "widen": Widen,
    "iso_c": IsoC,
    "tsv": TsvMerge,
    "wudi": Wudi,
    "doge": Doge,
    "adamerging": AdaMerging,
    "concrete": ConcreteMask,
    "fw": FwMerging,
}

__all__ = ["METHODS", "Case", "Comparator"]
