"""Fisher-weighted averaging: what a parent is sure of counts more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pleas.comparators.comparator import Case, Need, State
from pleas.comparators.one_size import Canvas, OneSize, Ranges, in_order
from pleas.evidence import Evidence
from pleas.statistics.collect import for_each
from pleas.symmetry import logits_of, permute_state


@dataclass(frozen=True)
class Fisher(OneSize):
    """W = sum_p F_p W_p / sum_p F_p, F_p the diagonal Fisher information of parent p (arXiv 2111.09832).

    F_p is the mean over proxies x of E_y (d log p(y | x) / dW)^2, y drawn from p's own predictions; all classes
    count by their probability, so that nothing is drawn. Norms' statistics are averaged.

    images:  proxies it is taken over, the first ones, at most
    classes: likeliest classes of an image whose gradients are taken, at most
    floor:   added to every F_p, so that weights which no parent needs are averaged
    permute: whether units are matched first, as the recipe matches them
    """

    title: ClassVar[str] = "Fisher"
    needs: ClassVar[frozenset[Need]] = frozenset({"images", "gradients"})
    ranges: ClassVar[Ranges] = {"images": (1, 10**6), "classes": (1, 10**6), "floor": (1e-30, 1)}
    images: int = 256
    classes: int = 4
    floor: float = 1e-6
    permute: bool = True

    def align(self, case: Case) -> Evidence:
        return in_order(case.evidence, "recipe" if self.permute else "none")

    def merge(self, canvas: Canvas, case: Case) -> State:
        evidence = canvas.evidence
        symmetry = evidence.parents.symmetry
        fishers = [
            permute_state(symmetry, self.information(evidence, p), alignment)
            for p, alignment in enumerate(evidence.alignments)
        ]
        merged: dict[str, Tensor] = {}
        for name in fishers[0]:
            if name not in canvas.heads:
                weights = torch.stack([fisher[name] + self.floor for fisher in fishers])
                own = torch.stack([state[name].double().cpu() for state in evidence.states])
                merged[name] = (weights * own).sum(0) / weights.sum(0)
        return merged

    def information(self, evidence: Evidence, parent: int) -> dict[str, Tensor]:
        """The diagonal Fisher information of one parent in its own order of units, float64 on the CPU."""
        parents = evidence.parents
        program = parents.symmetry.program
        module = parents.modules[parent]
        named = dict(module.named_parameters())
        wanted = [n for n in program.parameters if n in named and named[n].is_floating_point()]
        found: dict[str, Tensor] = {}
        seen = 0
        for batch in evidence.inputs:
            images = for_each(batch, parents)[parent]
            taken = {
                name: value.detach().to(images.device).requires_grad_(name in wanted)
                for name, value in (*named.items(), *module.named_buffers())
            }
            leaves = [taken[name] for name in wanted]
            for image in images[: self.images - seen]:
                answer = torch.func.functional_call(module, taken, (image[None],), tie_weights=True)
                self._add(found, wanted, leaves, logits_of(answer))
                seen += 1
            if seen >= self.images:
                break
        return {name: total / seen for name, total in found.items()}

    def _add(
        self, found: dict[str, Tensor], names: list[str], leaves: list[Tensor], logits: Tensor | None
    ) -> None:
        assert logits is not None
        logs = logits.flatten().log_softmax(0)
        chances, likeliest = logs.detach().exp().topk(min(self.classes, len(logs)))
        chances = chances / chances.sum()
        for number, (chance, y) in enumerate(zip(chances.tolist(), likeliest.tolist(), strict=True)):
            last = number == len(likeliest) - 1
            grads = torch.autograd.grad(logs[y], leaves, retain_graph=not last)
            for name, grad in zip(names, grads, strict=True):
                square = chance * grad.detach().double().square().cpu()
                found[name] = found[name] + square if name in found else square
