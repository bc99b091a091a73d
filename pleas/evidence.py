"""What the proxies say about the parents: gathered once, read by every plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from pleas.errors import InputError
from pleas.matching.match import match
from pleas.parents import Parents
from pleas.plan.fusing import FusingCosts, Split, fusing_costs
from pleas.statistics.collect import Batch, Progress, Statistics, collect
from pleas.symmetry import Permutation, permute_state


@dataclass(frozen=True, repr=False)
class Evidence:
    """The parents in one common order of units, and the proxies that say so.

    inputs:     batches of proxies, read again by every solve: see `pleas.statistics.collect.Batch`
    alignments: per parent, the permutation into the first parent's order
    """

    parents: Parents
    inputs: Iterable[Batch]
    statistics: Statistics
    alignments: tuple[Permutation, ...]

    def __repr__(self) -> str:
        return f"Evidence({self.statistics.images} images, {self.parents!r})"

    @cached_property
    def states(self) -> tuple[dict[str, Tensor], ...]:
        """Every parent's tensors with its units in the common order."""
        symmetry = self.parents.symmetry
        return tuple(
            permute_state(symmetry, state, alignment)
            for state, alignment in zip(self.parents.states, self.alignments, strict=True)
        )

    @cached_property
    def costs(self) -> FusingCosts:
        """What fusing every unit would cost; computed when a plan needs it."""
        return fusing_costs(self.parents, self.statistics, self.alignments)

    @cached_property
    def splits(self) -> Mapping[int, Sequence[Split]]:
        """The order in which the units of every class come apart."""
        return self.costs.splits()


def gather(
    parents: Parents,
    inputs: Iterable[Batch],
    *,
    statistics: Statistics | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """One pass over the proxies, and the matching it gives.

    inputs:     a collection of batches: it is read again by every solve
    statistics: what `collect` gave for these inputs, where the caller has it
    """
    if not hasattr(inputs, "__len__") and iter(inputs) is inputs:
        raise InputError(
            "inputs is a one-shot iterator; give a list of batches or a DataLoader: it is read once for the "
            "statistics and once for every plan"
        )
    if statistics is None:
        statistics = collect(parents, inputs, progress=progress)
    return Evidence(parents, inputs, statistics, match(parents, statistics))
