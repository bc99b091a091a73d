"""How long a cell will take, from the cells that were run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from datafree.ablate.axes import RECIPE
from datafree.ablate.book import Entry
from datafree.ablate.grid import Cell


def expected(cell: Cell, finished: Sequence[Entry]) -> float | None:
    """Seconds: the median of the finished cells that are most like `cell`; None where none is finished.

    Most like are those of the same recipe with most values in common. A cell whose proxies are in the cache takes less
    than one that makes them, so that the first of many is no measure of all: hence the median.
    """
    found: dict[tuple[int, int], list[float]] = {}
    for entry in finished:
        found.setdefault(_alike(cell.labels, entry.labels), []).append(entry.seconds)
    return statistics.median(found[max(found)]) if found else None


def _alike(one: Mapping[str, str], other: Mapping[str, str]) -> tuple[int, int]:
    common = sum(other.get(axis) == label for axis, label in one.items())
    return int(one.get(RECIPE) == other.get(RECIPE)), common


def remaining(cells: Sequence[Cell], finished: Sequence[Entry], jobs: int = 1) -> float | None:
    """Seconds that `cells` will take, `jobs` at a time; None where nothing is known."""
    known = [expected(cell, finished) for cell in cells]
    told = [seconds for seconds in known if seconds is not None]
    return None if len(told) < len(known) else sum(told) / max(1, min(jobs, len(cells)))


def spell(seconds: float | None) -> str:
    """ "45 s", "12 min", "3 h 20 min", "?"."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
