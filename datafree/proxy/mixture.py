"""How several sources share one set of images."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from datafree.errors import UsageError


def interleave(shares: Sequence[float], count: int) -> np.ndarray:
    """Which source each of `count` images comes from, int64 (count,): every prefix is itself a fair mixture.

    For every n, the first n images hold fewer than one image more or less than `share * n` of each source,
    hence exactly `share * n` where all of those are whole. This is the chairman assignment problem; the
    rule (among the sources that may be served without getting ahead, the one whose deadline comes first)
    and the bound 1 - 1/(2k - 2) for k sources are Tijdeman's (1980). Exact arithmetic: the order is the
    same on every machine.

    Raises UsageError when the shares do not add up to 1.
    """
    weights = [Fraction(share).limit_denominator(1_000_000) for share in shares]
    total = sum(weights)
    if abs(total - 1) > Fraction(1, 10_000):
        listed = ", ".join(f"{share:g}" for share in shares)
        raise UsageError(
            f"the shares under proxy.sources ({listed}) add up to {float(total):g}: make them add up to 1"
        )
    weights = [weight / total for weight in weights]  # three times 0.3333 is meant as thirds
    slack = Fraction(1) if len(weights) == 1 else 1 - Fraction(1, 2 * len(weights) - 2)
    served = [0] * len(weights)
    order = np.empty(count, dtype=np.int64)
    for position in range(count):
        may = [k for k, weight in enumerate(weights) if weight * (position + 1) - served[k] >= 1 - slack]
        chosen = min(may, key=lambda k: ((served[k] + slack) / weights[k], k))
        served[chosen] += 1
        order[position] = chosen
    return order
