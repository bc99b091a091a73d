"""What a rival's method is here: its settings as fields, what it needs, and a call that gives a state or a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from torch import Tensor, nn

from pleas.evidence import Evidence
from pleas.parents import Parents
from pleas.statistics.collect import Batch

Need = Literal["statistics", "matching", "images", "gradients", "base", "shared labels"]
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """What a comparator is given.

    evidence: the parents, their statistics on the proxies and the matching
    images:   batches of proxies, read as often as asked; the same as `evidence.inputs`
    base:     the state the parents were fine-tuned from, in the first parent's names; None where there is none
    seed:     of everything random
    """

    evidence: Evidence
    images: Iterable[Batch]
    base: State | None = None
    seed: int = 0


@dataclass(frozen=True)
class Comparator(ABC):
    """A method that gives one network of one parent's size.

    Its fields are the keys of a recipe's `compare`, with published defaults; the first line of its docstring is the
    legend of the report, with paper and equation.
    """

    title: ClassVar[str] = ""  # what tables call it; without one, its name in METHODS
    needs: ClassVar[frozenset[Need]] = frozenset()
    most_parents: ClassVar[int | None] = None  # where the method is defined for fewer than any number

    @abstractmethod
    def __call__(self, case: Case) -> State | nn.Module:
        """A state in the first parent's names and shapes, or a whole network. Never changes what it was given."""

    @classmethod
    def legend(cls) -> str:
        """What the method is, in one line."""
        return (cls.__doc__ or "").strip().splitlines()[0]

    def changed(self) -> str:
        """The keys that are not at their defaults, as `off_diagonal 0.8, permute False`."""
        values = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]
        return ", ".join(f"{name} {value}" for name, value, default in values if value != default)

    def obstacle(self, parents: Parents, *, base: bool = False) -> str | None:
        """Why it cannot run on these parents, in one clause that says what would help; None where it can.

        base: whether the state the parents were fine-tuned from is there. Takes seconds at most.
        """
        if "base" in self.needs and not base:
            return "it needs the network that all parents were fine-tuned from: give `base`"
        if "shared labels" in self.needs and parents.settings.heads != "shared":
            return "it is defined for parents that share their labels: say `labels: shared`"
        if self.most_parents is not None and parents.count > self.most_parents:
            return f"it is defined for {self.most_parents} parents, and there are {parents.count}"
        return None
