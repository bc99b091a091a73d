"""The parents of a run, what they have in common, and the symmetry of their architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import pleas
from datafree.errors import UsageError
from datafree.evaluation.evaluate import Columns, merged_columns
from datafree.images.preprocess import Preprocess
from datafree.models.parent import Parent, load_base, load_parent
from datafree.models.union import Union, union_of
from datafree.recipe.file import RecipeFile
from datafree.stages.work import Work
from pleas.plan.reach import reach, say_reach


@dataclass(frozen=True)
class LoadedParents:
    """Every parent of a recipe, in its order.

    input: how images become the merged network's input
    base:  what the parents were fine-tuned from, where the recipe says so; it is none of them
    union: of their classes, with `labels: union`
    """

    each: tuple[Parent, ...]
    input: Preprocess
    notes: tuple[str, ...]
    base: Parent | None = None
    union: Union | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(parent.name for parent in self.each)

    @property
    def first(self) -> Parent:
        return self.each[0]

    @property
    def same_input(self) -> bool:
        """Whether all take the same pixels."""
        return all(parent.preprocess == self.first.preprocess for parent in self.each)

    @property
    def example(self) -> Tensor:
        """Two images of zeros as the networks take them, for tracing and counting."""
        return torch.zeros(2, *self.input.shape)

    def columns(self, labels: str) -> Columns:
        """Heads of a network that answers for all parents."""
        outputs = {parent.name: parent.outputs for parent in self.each}
        return merged_columns(labels, outputs, self.places)

    @property
    def places(self) -> tuple[tuple[int, ...], ...] | None:
        """For each parent the merged output that each of its own is; None where labels are not a union."""
        return None if self.union is None else self.union.places

    def settings(self, work: Work) -> pleas.MergeSettings:
        """The recipe's settings, with what only its parents know."""
        return work.settings if self.union is None else replace(work.settings, outputs=self.places)

    @property
    def fingerprint(self) -> list[dict[str, Any]]:
        """Everything about the parents that statistics depend on, in their order: units stand side by side in it."""
        return [
            {
                "name": parent.name,
                "reference": parent.reference,
                "arguments": dict(parent.arguments),
                "state": parent.fingerprint,
                "preprocess": parent.preprocess.to_dict(),
            }
            for parent in self.each
        ]


def load_parents(work: Work, *, probe: bool = False) -> LoadedParents:
    """All parents, checked to be one architecture whose outputs fit the recipe's `labels`.

    probe: do not train quickstart experts that are not cached yet
    Raises UsageError that names what is wrong with every parent, not only with the first.
    """
    recipe, parents, wrong = work.recipe, [], []
    with work.progress.stage("parents"):
        for name, spec in recipe.recipe.parents.items():
            try:
                with recipe.at("parents", name):
                    parents.append(load_parent(spec, name, recipe.base, probe=probe, progress=work.progress))
            except UsageError as error:
                wrong.append(str(error))
        if wrong:
            raise UsageError("\n".join(wrong))
        modules, names = [parent.module for parent in parents], [parent.name for parent in parents]
        with recipe.at("parents"):
            pleas.check_parents(modules, work.settings, names=names)
            common, notes = merged_input(parents)
        _check_labels(recipe, parents)
        union = None
        if recipe.recipe.labels == "union":
            with recipe.at():
                union = union_of(parents)
            notes = (*notes, *union.notes)
        said = [f"parent {parent.name}: {note}" for parent in parents for note in parent.notes]
        base, spec = None, recipe.recipe.base
        if spec is not None:
            with recipe.at("base"):
                base = load_base(spec, parents[0], recipe.base, probe=probe, progress=work.progress)
                pleas.check_parents(modules, work.settings, names=names, base=base.module)
            said += [f"the base: {note}" for note in base.notes]
    return LoadedParents(tuple(parents), common, (*said, *notes), base, union)


def _check_labels(recipe: RecipeFile, parents: Sequence[Parent]) -> None:
    if recipe.recipe.labels != "shared":
        return
    first = parents[0]
    for other in parents[1:]:
        if first.outputs != other.outputs:
            raise recipe.error(
                f"shared labels need parents with the same outputs, but {first.name} has {first.outputs} and "
                f"{other.name} has {other.outputs}: say `labels: separate` for one head per parent, "
                "or `labels: union` to join classes by name",
                "labels",
            )
        if first.classes and other.classes and first.classes != other.classes:
            pairs = enumerate(zip(first.classes, other.classes, strict=True))
            place = next(i for i, (x, y) in pairs if x != y)
            raise recipe.error(
                f"shared labels mean that output i is the same class in all parents, but output {place} is "
                f"{first.classes[place]!r} in {first.name} and {other.classes[place]!r} in {other.name}: say "
                "`labels: separate` or `union`, or correct `classes`",
                "labels",
            )


def merged_input(parents: Sequence[Parent]) -> tuple[Preprocess, tuple[str, ...]]:
    """How images become the merged network's input: the mean of what the parents see.

    Where mean and standard deviation differ, the mean of affine maps of a pixel is one affine map again.
    """
    seen: Mapping[str, Preprocess] = {parent.name: parent.preprocess for parent in parents}
    first = parents[0].preprocess
    if all(one == first for one in seen.values()):
        return first, ()
    if any(one.shape != first.shape for one in seen.values()):
        colours = {1: "grey", 3: "RGB"}
        each = ", ".join(
            f"{name} takes {p.size[0]}x{p.size[1]} {colours.get(p.channels, p.channels)}"
            for name, p in seen.items()
        )
        raise UsageError(
            f"the parents take different images ({each}): give all of them one size and one number of channels"
        )
    notes = []
    if any(one.interpolation != first.interpolation for one in seen.values()):
        notes.append(
            f"images of another size are resized for the merged network as for {parents[0].name}: "
            f"{first.interpolation}"
        )
    channels, count = range(first.channels), len(parents)
    slopes = [sum(1 / one.std[c] for one in seen.values()) / count for c in channels]
    offsets = [sum(one.mean[c] / one.std[c] for one in seen.values()) / count for c in channels]
    mean = tuple(offset / slope for offset, slope in zip(offsets, slopes, strict=True))
    std = tuple(1 / slope for slope in slopes)
    if any((one.mean, one.std) != (first.mean, first.std) for one in seen.values()):
        notes.append("the parents normalise differently: the merged network takes the mean of their inputs")
    return replace(first, mean=mean, std=std), tuple(notes)


def trace_parents(work: Work, parents: LoadedParents) -> pleas.Parents:
    """The networks of the merge: which units of their architecture are exchangeable, verified numerically.

    Says where everything apart is not the ensemble, and which budgets of the recipe cannot be reached.
    """
    with work.progress.stage("symmetry"), work.recipe.at("parents", parents.first.name, "model"):
        networks = pleas.Parents.of(
            [parent.module for parent in parents.each],
            parents.example,
            parents.settings(work),
            names=parents.names,
            base=None if parents.base is None else parents.base.module,
        )
        budgets = [point.value for point in work.points if point.kind == "budget"]
        for note in (*networks.notes, *say_reach(reach(networks), budgets)):
            work.progress.note(note)
    return networks
