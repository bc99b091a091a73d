"""PLeaS: merge two networks by permutations and least squares (arXiv 2407.02447), in closed form, on any
inputs.

The mathematics of datafree: torch and scipy only, no files, no printing, no network.
"""

from pleas.baselines import Ensemble, permutation_only, plain_average, reestimate_bn
from pleas.errors import InputError, MergeFailed, PleasError
from pleas.matching import match
from pleas.merge import LayerEvidence, MergeResult, assemble, check_parents, merge
from pleas.module import MergedNetwork, flops, module_from_config, program_config
from pleas.moments import Moments
from pleas.plan import FusingCosts, Plan, fusing_costs, make_plan
from pleas.settings import MergeSettings
from pleas.statistics import Statistics, collect, collect_grouped
from pleas.symmetry import Permutation, Symmetry, trace

__all__ = [
    "Ensemble",
    "FusingCosts",
    "InputError",
    "LayerEvidence",
    "MergeFailed",
    "MergeResult",
    "MergeSettings",
    "MergedNetwork",
    "Moments",
    "Permutation",
    "Plan",
    "PleasError",
    "Statistics",
    "Symmetry",
    "assemble",
    "check_parents",
    "collect",
    "collect_grouped",
    "flops",
    "fusing_costs",
    "make_plan",
    "match",
    "merge",
    "module_from_config",
    "permutation_only",
    "plain_average",
    "program_config",
    "reestimate_bn",
    "trace",
]
