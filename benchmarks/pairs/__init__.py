"""Groups of two or more networks to merge, each with what judges it: `PAIRS`, a name -> `Group`.

    group = PAIRS["mnist_usps"]
    merged = pleas.merge(*group.modules, group.inputs(group.public_images), budget=1.25)
    accuracy(merged.module, group)     # {"mnist": 0.93, "usps": 0.95}

Nothing is read, trained or kept in memory before it is asked for. `python -m benchmarks.pairs` prints the parents', the
ensemble's and the plain average's accuracy of every group.
"""

from benchmarks.pairs.group import Ensemble, Group, Task, accuracy, average, plain_average
from benchmarks.pairs.groups import PAIRS

__all__ = ["PAIRS", "Ensemble", "Group", "Task", "accuracy", "average", "plain_average"]
