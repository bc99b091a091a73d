"""The stages of a merge, one function each: frozen values in, a frozen value out. `pipeline` says in which
order.

Long stages keep what they found in the store, so that a run that was interrupted goes on where it stopped.
"""

from datafree.stages.barrier import measure_barriers
from datafree.stages.comparing import Chosen, Compared, caution, choose_methods, compare_methods
from datafree.stages.diagnosing import judge_proxies
from datafree.stages.holding import HeldOut, hold_out
from datafree.stages.inputs import (
    EvaluationSet,
    Inputs,
    image_inputs,
    load_oracle,
    load_tasks,
    make_proxies,
    make_refine_proxies,
    proxy_inputs,
    refine_seed,
    refuse_leak,
)
from datafree.stages.judging import AllParents, Judge, evaluate_all, time_networks
from datafree.stages.likeness import layer_similarity
from datafree.stages.merging import (
    Merged,
    check_rows,
    gather_evidence,
    make_plans,
    merge_real,
    solve_plans,
)
from datafree.stages.parents import LoadedParents, load_parents, trace_parents
from datafree.stages.refining import check_refining, refine_merged
from datafree.stages.work import Work, begin, choose_device, exact_arithmetic

__all__ = [
    "AllParents",
    "Chosen",
    "Compared",
    "EvaluationSet",
    "HeldOut",
    "Inputs",
    "Judge",
    "LoadedParents",
    "Merged",
    "Work",
    "begin",
    "caution",
    "check_refining",
    "check_rows",
    "choose_device",
    "choose_methods",
    "compare_methods",
    "evaluate_all",
    "exact_arithmetic",
    "gather_evidence",
    "hold_out",
    "image_inputs",
    "judge_proxies",
    "layer_similarity",
    "load_oracle",
    "load_parents",
    "load_tasks",
    "make_plans",
    "make_proxies",
    "make_refine_proxies",
    "measure_barriers",
    "merge_real",
    "proxy_inputs",
    "refine_merged",
    "refine_seed",
    "refuse_leak",
    "solve_plans",
    "time_networks",
    "trace_parents",
]
