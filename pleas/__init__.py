"""PLeaS: merge networks by permutations and least squares (arXiv 2407.02447), in closed form, on any inputs.

The mathematics of datafree: torch and scipy only, no files, no printing, no network.

    parents  = Parents.of([a, b, c], example)      # one architecture, checked and traced
    evidence = gather(parents, batches)            # second moments of units, and the matching they give
    plan     = make_plan(evidence, budget=1.25)    # which units are fused, under a budget of multiply-adds
    result   = assemble(evidence, plan)            # every layer by least squares, on what the merged network feeds it
"""

from pleas.assemble import LayerEvidence, MergeResult, assemble
from pleas.baselines import Ensemble, reestimate_bn
from pleas.errors import InputError, MergeFailed, PleasError
from pleas.evidence import Evidence, gather
from pleas.matching.match import match
from pleas.merge import merge
from pleas.network.module import MergedNetwork, flops, module_from_config, program_config
from pleas.parents import Parents, check_parents
from pleas.plan.fusing import FusingCosts, fusing_costs
from pleas.plan.plan import Plan, make_plan
from pleas.settings import MergeSettings
from pleas.statistics.collect import Statistics, collect
from pleas.statistics.moments import Moments
from pleas.symmetry import Permutation, Symmetry, trace

__all__ = [
    "Ensemble",
    "Evidence",
    "FusingCosts",
    "InputError",
    "LayerEvidence",
    "MergeFailed",
    "MergeResult",
    "MergeSettings",
    "MergedNetwork",
    "Moments",
    "Parents",
    "Permutation",
    "Plan",
    "PleasError",
    "Statistics",
    "Symmetry",
    "assemble",
    "check_parents",
    "collect",
    "flops",
    "fusing_costs",
    "gather",
    "make_plan",
    "match",
    "merge",
    "module_from_config",
    "program_config",
    "reestimate_bn",
    "trace",
]
