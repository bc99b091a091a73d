"""What the proxies say about the parents: gathered once, read by every plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from pleas.errors import InputError
from pleas.matching.match import match, units_moved
from pleas.parents import Parents
from pleas.plan.fusing import FusingCosts, Split, fusing_costs
from pleas.statistics.collect import Batch, Progress, Statistics, collect, for_each
from pleas.statistics.domains import NO_DOMAINS, Contradiction, Domains, look, uneven
from pleas.symmetry import Permutation, permute_state


@dataclass(frozen=True, repr=False)
class Evidence:
    """The parents in one common order of units, and the proxies that say so.

    inputs:     batches of proxies, read again by every solve: see `pleas.statistics.collect.Batch`
    alignments: per parent, the permutation into the first parent's order
    given:      (images, parents) how much each parent counts in the targets of every image, where the caller knows it;
                None: settings.targets decides
    """

    parents: Parents
    inputs: Iterable[Batch]
    statistics: Statistics
    alignments: tuple[Permutation, ...]
    given: Tensor | None = None

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

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of the matching, one sentence each."""
        return units_moved(self.parents, self.alignments)

    @cached_property
    def domains(self) -> Domains | None:
        """Whose images the proxies are, from one more pass; None where the parents have no batch norms."""
        inputs = (for_each(batch, self.parents) for batch in self.inputs)
        return look(self.parents.modules, inputs, self.parents.names)

    @cached_property
    def contradictions(self) -> tuple[Contradiction, ...]:
        """Where one parent outvotes another on that one's own images; only parents of one head can."""
        if self.parents.settings.heads != "shared" or self.domains is None:
            return ()
        return self.domains.contradictions

    @cached_property
    def shares(self) -> Tensor | None:
        """(images, parents) how much each parent counts in the targets of every image; None: all alike.

        Raises InputError for targets = "own" where nothing tells whose the images are.
        """
        targets = self.parents.settings.targets
        if self.given is not None or targets == "mean":
            return uneven(self.given)
        if targets == "auto":
            heads = self.parents.settings.heads
            if (
                heads == "union" or self.domains is None
            ):  # an output that several know is theirs on every image
                return None
            return uneven(self.domains.shares) if self.domains.differ(heads) else None
        if self.domains is None:
            raise InputError(NO_DOMAINS)
        return uneven(self.domains.shares)

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
