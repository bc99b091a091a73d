"""Which units to fuse and which to keep apart under a compute budget.

A unit starts fused by all parents and may be split step by step, until every parent has its own. Within a class the
least similar units are split first. How many, class by class, follows from what fusing costs (`pleas.plan.fusing`).
Widths follow a greedy path over classes, the splits that save most predicted error per multiply-add first; residual
streams, which norms run over, come apart when all else has (decision 14). Plans of growing budgets are prefixes of one
path, so more budget never predicts more error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pleas.errors import InputError
from pleas.evidence import Evidence
from pleas.plan.cost import FlopModel
from pleas.plan.fusing import Split
from pleas.plan.heads import merged_outputs
from pleas.plan.layout import ClassPlan, everyone
from pleas.plan.reach import reach, say_reach
from pleas.settings import Allocation, MergeSettings
from pleas.symmetry.owners import reduced_over

CHUNKS = 32  # a class is kept apart in steps of 1/32 of its splits


@dataclass(frozen=True, repr=False)
class Plan:
    """The merged units of every class, and what they cost.

    flops:           of the merged network's layers, per image (2 per multiply-add)
    parent_flops:    of one parent's layers
    share_apart:     of the units there could be beyond those of one parent, those that there are
    saved, at_stake: predicted relative error that keeping units apart avoids, and what fusing everything
        would cost; None where nothing had to be predicted
    notes:           what is to be said of a budget that cannot be reached
    """

    classes: Mapping[int, ClassPlan]
    flops: int
    parent_flops: int
    share_apart: float
    saved: float | None = None
    at_stake: float | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return (
            f"Plan({self.ratio:.3f}x multiply-adds, {100 * self.share_apart:.0f} % of what may stay apart, in "
            f"{len(self.classes)} classes of units)"
        )

    @property
    def ratio(self) -> float:
        """Multiply-adds relative to one parent."""
        return self.flops / self.parent_flops

    @property
    def predicted_error(self) -> float | None:
        """Relative error of the readers' outputs that fusing is predicted to cause, summed over layers."""
        if self.at_stake is None or self.saved is None:
            return None
        return self.at_stake - self.saved


def make_plan(
    evidence: Evidence,
    *,
    budget: float | None = None,
    apart: float | None = None,
    allocation: Allocation | None = None,
) -> Plan:
    """A plan for a budget (multiply-adds relative to one parent, from 1 to the number of parents) or for a fraction of
    every class kept apart.

    allocation: instead of that of the settings

    Classes that cannot be widened stay fused; `notes` says where the budget cannot be reached for that. With separate
    heads the output class is as many heads side by side; a budget below what that alone costs gives the narrowest
    network.
    """
    parents = evidence.parents
    settings: MergeSettings = parents.settings
    _check(budget, apart, parents.count)
    outputs = merged_outputs(parents)
    model = FlopModel(parents.symmetry, parents.count, outputs)
    sizes = {
        i: c.size
        for i, c in enumerate(parents.symmetry.classes)
        if c.widenable and i not in parents.symmetry.output
    }
    if budget == 1 or apart == 0:  # nothing to choose, so nothing has to be priced
        return _plan(evidence, {}, dict.fromkeys(sizes, 0), sizes, model, outputs)
    splits = evidence.splits
    lengths = {c: len(chosen) for c, chosen in splits.items()}
    widths = dict.fromkeys(splits, 0)
    counts = {c: _Counts(chosen, parents.count, sizes[c]) for c, chosen in splits.items()}
    if apart is not None:
        widths = _uniform(lengths, apart)
    elif budget is not None:
        # Rewrites add a little of their own: all parents side by side are within a budget of all the same.
        most = parents.count * max(model.parent, model.total({}))
        limit = budget * model.parent if budget < parents.count else most

        def fits(candidate: Mapping[int, int]) -> bool:
            return model.total(_masks(counts, candidate)) <= limit

        last = reduced_over(parents.symmetry)
        widths = _widest(splits, counts, model, allocation or settings.allocation, fits, last)
    found = _plan(evidence, splits, widths, sizes, model, outputs)
    return found if budget is None else replace(found, notes=say_reach(reach(parents), [budget]))


def _check(budget: float | None, apart: float | None, parents: int) -> None:
    if (budget is None) == (apart is None):
        raise InputError(
            f"give exactly one of budget (multiply-adds, 1.0 to {parents}.0) and apart (fraction kept apart, 0 to 1)"
        )
    for name, value in (("budget", budget), ("apart", apart)):
        if value is not None and not isinstance(value, int | float):
            raise InputError(
                f"{name} = {value!r}: one number is needed; for several networks call make_plan and assemble for each "
                "of them on the same evidence, or datafree.merge(..., budgets=[...])"
            )
    if budget is not None and not 1 <= budget <= parents:
        raise InputError(
            f"budget = {budget}: must lie between 1.0 (one parent) and {parents}.0 (all {parents} side by side)"
        )
    if apart is not None and not 0 <= apart <= 1:
        raise InputError(f"apart = {apart}: must lie between 0 (all units fused) and 1 (none)")


@dataclass(frozen=True)
class _Counts:
    """How many merged units of every mask a class has after each number of its splits."""

    splits: Sequence[Split]
    parents: int
    size: int
    _after: list[Mapping[int, int]] = field(default_factory=list)

    def after(self, number: int) -> Mapping[int, int]:
        if not self._after:
            now = Counter({everyone(self.parents): self.size})
            self._after.append(dict(now))
            for split in self.splits:
                now[split.whole] -= 1
                for part in split.parts:
                    now[part] += 1
                self._after.append({mask: count for mask, count in now.items() if count})
        return self._after[number]


def _masks(counts: Mapping[int, _Counts], widths: Mapping[int, int]) -> dict[int, Mapping[int, int]]:
    return {c: counts[c].after(number) for c, number in widths.items()}


def _plan(
    evidence: Evidence,
    splits: Mapping[int, Sequence[Split]],
    widths: Mapping[int, int],
    sizes: Mapping[int, int],
    model: FlopModel,
    outputs: ClassPlan | None,
) -> Plan:
    parents = evidence.parents
    plans: dict[int, ClassPlan] = {}
    for index, unit_class in enumerate(parents.symmetry.classes):
        if index in parents.symmetry.output and outputs is not None:
            plans[index] = outputs
            continue
        partitions = [[everyone(parents.count)] for _ in range(unit_class.size)]
        for split in splits.get(index, ())[: widths.get(index, 0)]:
            partitions[split.unit].remove(split.whole)
            partitions[split.unit] += split.parts
        plans[index] = ClassPlan.of(partitions, parents.count)
    masks = {c: Counter(plans[c].masks.tolist()) for c in sizes}
    extra = sum(plans[c].width - size for c, size in sizes.items())
    share = extra / max(1, (parents.count - 1) * sum(sizes.values()))
    if not splits:
        return Plan(plans, model.total(masks), model.parent, share)
    saved = sum(split.saves for c, chosen in splits.items() for split in chosen[: widths[c]])
    at_stake = sum(split.saves for chosen in splits.values() for split in chosen)
    return Plan(plans, model.total(masks), model.parent, share, saved, at_stake)


def _uniform(lengths: Mapping[int, int], share: float) -> dict[int, int]:
    return {c: int(share * length + 0.5) for c, length in lengths.items()}


def _widest(
    splits: Mapping[int, Sequence[Split]],
    counts: Mapping[int, _Counts],
    model: FlopModel,
    allocation: Allocation,
    fits: Callable[[Mapping[int, int]], bool],
    last: frozenset[int] = frozenset(),
) -> dict[int, int]:
    """The most splits per class that fit, along the path of the allocation.

    last: classes that, where error allocates, come apart when all others are (decision 14)
    """
    lengths = {c: len(chosen) for c, chosen in splits.items()}
    widths = dict.fromkeys(splits, 0)
    if allocation == "uniform":
        steps = 8 * max(lengths.values(), default=0)
        shares = (_uniform(lengths, step / steps) for step in range(steps, 0, -1))
        return next((share for share in shares if fits(share)), widths)
    if allocation in ("zip", "early"):
        for c in sorted(splits, key=model.depth, reverse=allocation == "zip"):
            widths[c] = _most(lengths[c], lambda m, c=c: fits({**widths, c: m}))
        return widths
    saves = {c: torch.tensor([split.saves for split in chosen]) for c, chosen in splits.items()}
    open_classes = {c for c in splits if lengths[c] and c not in last}
    waiting = {c for c in splits if lengths[c] and c in last}
    while open_classes or waiting:
        if not open_classes:
            if any(widths[c] < lengths[c] for c in splits if c not in last):
                break
            open_classes, waiting = waiting, set()
        best = max(sorted(open_classes), key=lambda c: _gain(c, saves[c], widths, counts, model))
        reach = min(lengths[best], widths[best] + _chunk(lengths[best]))
        if fits({**widths, best: reach}):
            widths[best] = reach
        else:  # what is left of the budget goes to smaller steps, and to other classes
            more = _most(reach - widths[best], lambda m, c=best: fits({**widths, c: widths[c] + m}))
            widths[best] += more
            open_classes.discard(best)
        if widths[best] == lengths[best]:
            open_classes.discard(best)
    return widths


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits, by bisection; 0 is taken to."""
    low = 0
    while low < limit:
        middle = (low + limit + 1) // 2
        low, limit = (middle, limit) if fits(middle) else (low, middle - 1)
    return low


def _chunk(splits: int) -> int:
    return max(1, splits // CHUNKS)


def _gain(
    c: int, saves: Tensor, widths: Mapping[int, int], counts: Mapping[int, _Counts], model: FlopModel
) -> float:
    """Predicted error saved per FLOP by the next chunk of this class."""
    m = min(len(saves), widths[c] + _chunk(len(saves)))
    now = _masks(counts, widths)
    more = model.total({**now, c: counts[c].after(m)}, [c]) - model.total(now, [c])
    return float(saves[widths[c] : m].sum()) / max(1, more)
