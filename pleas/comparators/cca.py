"""CCA-Merge: the parents' units are aligned by linear maps instead of permutations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pleas.comparators.comparator import Case, Comparator, Need
from pleas.comparators.mixing import free_classes, not_mixable, unit_covariances
from pleas.comparators.one_size import Repair, check_choice, check_range
from pleas.comparators.zipit import merge_mixed
from pleas.evidence import Evidence
from pleas.parents import Parents
from pleas.plan.plan import make_plan


@dataclass(frozen=True)
class CCAMerge(Comparator):
    """Units are mixed into the first parent's by canonical correlation analysis, then averaged (arXiv 2407.05385).

    With the canonical directions P_1 and P_p of both parents' units, x_1 is near T x_p, T = (P_p P_1^-1)^T, so that the
    weights W_p become T W_p T_before^-1. Second moments are those of what layers read; where none reads, of what is
    written.

    ridge: added to the variances, relative to their mean
    """

    title: ClassVar[str] = "CCA-Merge"
    needs: ClassVar[frozenset[Need]] = frozenset({"statistics"})
    repair: Repair = "proxies"
    ridge: float = 1e-2

    def __post_init__(self) -> None:
        check_choice("repair", self.repair, ("none", "proxies"))
        check_range("ridge", self.ridge, 1e-9, 1e3)

    def obstacle(self, parents: Parents, *, base: bool = False) -> str | None:
        return super().obstacle(parents, base=base) or not_mixable(parents)

    def __call__(self, case: Case) -> nn.Module:
        evidence = case.evidence
        count = evidence.parents.count
        gives: list[dict[int, Tensor]] = [{} for _ in range(count)]
        reads: list[dict[int, Tensor]] = [{} for _ in range(count)]
        for c in free_classes(evidence.parents.symmetry):
            covariance = _covariance(evidence, c)
            if covariance is None:
                continue  # nobody observed it: its units stay as they come
            for p in range(1, count):
                map_ = aligning_map(covariance, p, self.ridge)
                gives[p][c], reads[p][c] = map_, torch.linalg.inv(map_).T
        return merge_mixed(evidence, make_plan(evidence, apart=0.0), gives, reads, self.repair)


def _covariance(evidence: Evidence, c: int) -> Tensor | None:
    """(parents, units, parents, units): of what the first layer reads of the class, or writes where none reads it."""
    parents = evidence.parents
    seen = list(unit_covariances(parents.symmetry, evidence.statistics, parents.count, c))
    if not seen:
        return None
    _, chosen = next((one for one in seen if one[0] == 1), seen[0])
    return chosen.unflatten(0, (parents.count, -1)).unflatten(2, (parents.count, -1))


def aligning_map(covariance: Tensor, p: int, ridge: float) -> Tensor:
    """T (units, units) with x_1 near T x_p: from covariance (parents, units, parents, units)."""
    first, own, cross = covariance[0, :, 0], covariance[p, :, p], covariance[0, :, p]
    root_1, root_p = _whitening(first, ridge), _whitening(own, ridge)
    left, _, right = torch.linalg.svd(root_1 @ cross @ root_p)
    directions_1, directions_p = root_1 @ left, root_p @ right.T
    return torch.linalg.solve(directions_1.T, directions_p.T)


def _whitening(covariance: Tensor, ridge: float) -> Tensor:
    """(C + ridge mean(diag C) I)^-1/2; of units that are all constant the identity."""
    level = covariance.diagonal().mean()
    if not level > 0:
        return torch.eye(len(covariance), dtype=covariance.dtype)
    values, vectors = torch.linalg.eigh(covariance)
    return vectors @ torch.diag((values.clamp_min(0) + ridge * level).rsqrt()) @ vectors.T
