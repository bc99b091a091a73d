"""Refine: a short distillation of the parents into the merged network, on proxy images only."""

from pleas.refine.distil import Closeness, Teacher, kind_of_outputs
from pleas.refine.features import Features, feature_layers
from pleas.refine.settings import RefineSettings
from pleas.refine.training import Check, RefineResult, Renew, Snapshot, refine
from pleas.refine.views import Augment, shift_and_flip

__all__ = [
    "Augment",
    "Check",
    "Closeness",
    "Features",
    "RefineResult",
    "RefineSettings",
    "Renew",
    "Snapshot",
    "Teacher",
    "feature_layers",
    "kind_of_outputs",
    "refine",
    "shift_and_flip",
]
