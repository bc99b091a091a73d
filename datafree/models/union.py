"""One head over the classes of several parents: those of one name are one output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datafree.errors import UsageError
from datafree.models.parent import Parent


@dataclass(frozen=True)
class Union:
    """The classes of all parents, in the order in which they are first named.

    places: for each parent, the output of the union that each of its own outputs is
    notes:  what is to be said of names that differ by their spelling only
    """

    classes: tuple[str, ...]
    places: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...] = ()


def union_of(parents: Sequence[Parent]) -> Union:
    """Raises UsageError, with the place in the recipe, where a parent's classes are not known or not told apart."""
    unnamed = [parent.name for parent in parents if parent.classes is None]
    if unnamed:
        raise UsageError(
            f"labels: union joins outputs by the names of their classes, and {' and '.join(unnamed)} "
            f"{'has' if len(unnamed) == 1 else 'have'} none: give `parents.{unnamed[0]}.classes`, one name for each "
            "output in order",
            "parents",
            unnamed[0],
        )
    known: dict[str, int] = {}
    places = []
    for parent in parents:
        names = parent.classes or ()
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(
                f"parent {parent.name} has two outputs called {twice!r}, and labels: union joins outputs by name: give "
                "every output its own",
                "parents",
                parent.name,
            )
        places.append(tuple(known.setdefault(name, len(known)) for name in names))
    return Union(tuple(known), tuple(places), tuple(_spelt_otherwise(known)))


def _spelt_otherwise(names: Sequence[str] | dict[str, int]) -> list[str]:
    """A note for every two names that are one but for capitals, spaces, hyphens and underscores."""
    seen: dict[str, str] = {}
    notes = []
    for name in names:
        first = seen.setdefault("".join(c for c in name.casefold() if c not in " -_"), name)
        if first != name:
            notes.append(
                f"the classes {first!r} and {name!r} are two outputs of the union: where they are one, spell them alike"
            )
    return notes
