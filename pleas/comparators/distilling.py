"""Distillation of all parents into one network of their size, on the proxies: from a parent and from scratch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pleas.comparators.comparator import Case, Comparator, Need
from pleas.comparators.one_size import Canvas, check_choice, check_range, in_order
from pleas.evidence import Evidence
from pleas.parents import Parents
from pleas.refine import RefineSettings, Teacher, refine, shift_and_flip
from pleas.statistics.collect import for_each
from pleas.symmetry import state_of

Start = Literal["parent", "scratch"]


@dataclass(frozen=True)
class Distillation(Comparator):
    """The first parent, or a network of its kind from scratch, trained to answer as all parents do (arXiv 1503.02531).

    On the proxies, moved a little and mirrored, with the settings of `refine`; the start is kept where training brings
    it no closer.

    start: "parent" or "scratch"    steps: batches    batch: images of each    rate: highest learning rate
    """

    title: ClassVar[str] = "distillation"
    needs: ClassVar[frozenset[Need]] = frozenset({"images", "gradients"})
    start: Start = "parent"
    steps: int = 1000
    batch: int = 64
    rate: float = 1e-3

    def __post_init__(self) -> None:
        check_choice("start", self.start, ("parent", "scratch"))
        check_range("steps", self.steps, 1, 10**6)
        check_range("batch", self.batch, 1, 10**6)
        check_range("rate", self.rate, 1e-9, 1e3)

    def obstacle(self, parents: Parents, *, base: bool = False) -> str | None:
        found = super().obstacle(parents, base=base)
        if found is None and parents.example.dim() != 4:
            return "it is trained on moved and mirrored images (N, C, H, W), and these inputs are none"
        return found

    def __call__(self, case: Case) -> nn.Module:
        evidence = case.evidence
        parents = evidence.parents
        images = torch.cat([torch.cat(for_each(b, parents), 1).cpu() for b in evidence.inputs]).float()
        kind, count = parents.example.dtype, parents.count

        def seen_by(p: int) -> Callable[[Tensor], Tensor]:
            return lambda packed: unpack(packed).chunk(count, 1)[p].to(kind)

        def merged(packed: Tensor) -> Tensor:
            return torch.stack(unpack(packed).chunk(count, 1)).mean(0).to(kind)

        result = refine(
            self._start(evidence, case.seed),
            [
                Teacher(name, module, seen_by(p))
                for p, (name, module) in enumerate(zip(parents.names, parents.modules, strict=True))
            ],
            pack(images),
            RefineSettings(steps=self.steps, batch=self.batch, rate=self.rate, seed=case.seed),
            normalise=merged,
            heads=parents.settings.heads,
            augment=lambda packed, generator: pack(shift_and_flip(unpack(packed), generator)),
            device=next(iter(evidence.inputs))[0].device,
        )
        return result.module.cpu().eval()

    def _start(self, evidence: Evidence, seed: int) -> nn.Module:
        """The first parent, units as they come; with separate heads it has all of them."""
        canvas = Canvas.of(in_order(evidence, "none"))
        module = evidence.parents.modules[0]
        if self.start == "scratch":
            module = fresh(module, seed)
        network = canvas.network(state_of(evidence.parents.symmetry.program, module))
        if self.start == "scratch":
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for name in sorted(canvas.heads):
                    head = network.get_parameter(name)
                    head.normal_(0, float(head.std()), generator=generator)
        return network.requires_grad_(True)


def fresh(module: nn.Module, seed: int) -> nn.Module:
    """A copy with new weights: each module as it initialises itself; parameters of others normal, of their own size."""
    module = copy.deepcopy(module).cpu()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for part in module.modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
            else:
                for parameter in part.parameters(recurse=False):
                    spread = parameter.std() if parameter.numel() > 1 else parameter.abs().mean()
                    parameter.normal_(0, float(spread))
    return module


def pack(images: Tensor) -> Tensor:
    """float32 (N, C, H, W) as the bytes that `refine` takes, (N, C, H, 4 W)."""
    return images.contiguous().view(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """Inverse of `pack`."""
    return packed.contiguous().view(torch.float32)
