"""The parents, what they have in common, and the symmetry of their architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import pleas
from datafree.errors import UsageError
from datafree.models import Parent, load_parent
from datafree.preprocess import Preprocess
from datafree.recipe import RecipeFile
from datafree.stages.work import Work
from pleas.layers import BATCH_NORM


@dataclass(frozen=True)
class Parents:
    """Both parents and what they have in common. input: how images become the merged network's input."""

    a: Parent
    b: Parent
    input: Preprocess
    notes: tuple[str, ...]

    @property
    def example(self) -> Tensor:
        """Two images of zeros as the networks take them, for tracing and counting."""
        return torch.zeros(2, *self.input.shape)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything about the parents that statistics depend on."""
        return {
            parent.name: {
                "reference": parent.reference,
                "arguments": dict(parent.arguments),
                "state": parent.fingerprint,
                "preprocess": parent.preprocess.to_dict(),
            }
            for parent in (self.a, self.b)
        }


def load_parents(work: Work, *, probe: bool = False) -> Parents:
    """Both parents, checked to be one architecture whose outputs fit the recipe's `labels`.

    probe: do not train quickstart experts that are not cached yet
    """
    recipe, specs = work.recipe, work.recipe.recipe.parents
    parents = []
    with work.progress.stage("parents"):
        for name, spec in (("a", specs.a), ("b", specs.b)):
            with recipe.at("parents", name):
                parents.append(load_parent(spec, name, recipe.base, probe=probe, progress=work.progress))
        a, b = parents
        with recipe.at("parents"):
            pleas.check_parents(a.module, b.module, work.settings)
            merged_input, notes = _merged_input(a, b)
        _check_labels(recipe, a, b)
    said = [f"parent {parent.name}: {note}" for parent in parents for note in parent.notes]
    return Parents(a, b, merged_input, (*said, *notes))


def _check_labels(recipe: RecipeFile, a: Parent, b: Parent) -> None:
    if recipe.recipe.labels == "separate":
        return
    if a.outputs != b.outputs:
        raise recipe.error(
            f"shared labels need parents with the same outputs, but a has {a.outputs} and b has "
            f"{b.outputs}: say "
            "`labels: separate` for one head per parent",
            "labels",
        )
    if a.classes and b.classes and a.classes != b.classes:
        first = next(i for i, (x, y) in enumerate(zip(a.classes, b.classes, strict=True)) if x != y)
        raise recipe.error(
            f"shared labels mean that output i is the same class in both parents, but output {first} is "
            f"{a.classes[first]!r} in a and {b.classes[first]!r} in b: say `labels: separate`, or "
            "correct `classes`",
            "labels",
        )


def _merged_input(a: Parent, b: Parent) -> tuple[Preprocess, tuple[str, ...]]:
    """How images become the merged network's input: the mean of what the parents see.

    Where mean and standard deviation differ, the mean of two affine maps of a pixel is one affine map again.
    """
    pa, pb = a.preprocess, b.preprocess
    if pa == pb:
        return pa, ()
    if pa.shape != pb.shape:
        colours = {1: "grey", 3: "RGB"}
        each = ", ".join(
            f"{name} takes {p.size[0]}x{p.size[1]} {colours.get(p.channels, p.channels)}"
            for name, p in (("a", pa), ("b", pb))
        )
        raise UsageError(
            f"the parents take different images ({each}): give both one size and one number of channels"
        )
    notes = []
    if pa.interpolation != pb.interpolation:
        notes.append(
            f"images of another size are resized for the merged network as for a: {pa.interpolation}"
        )
    slopes = [(1 / x + 1 / y) / 2 for x, y in zip(pa.std, pb.std, strict=True)]
    offsets = [
        (mx / sx + my / sy) / 2 for mx, sx, my, sy in zip(pa.mean, pa.std, pb.mean, pb.std, strict=True)
    ]
    mean = tuple(offset / slope for offset, slope in zip(offsets, slopes, strict=True))
    std = tuple(1 / slope for slope in slopes)
    if (pa.mean, pa.std) != (pb.mean, pb.std):
        notes.append("the parents normalise differently: the merged network takes the mean of their inputs")
    return replace(pa, mean=mean, std=std), tuple(notes)


def trace_symmetry(work: Work, parents: Parents, *, strict: bool = False) -> pleas.Symmetry:
    """Which units of the architecture are exchangeable, verified numerically."""
    with work.progress.stage("symmetry"), work.recipe.at("parents", "a", "model"):
        return pleas.trace(parents.a.module, parents.example, strict=strict)


def has_batch_norm(symmetry: pleas.Symmetry) -> bool:
    return any(node.target is BATCH_NORM for node in symmetry.program.graph.nodes)
