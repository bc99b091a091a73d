"""The networks of one merge: several parents of one architecture, checked and traced once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from pleas.errors import ArchitectureMismatch, InputError, NonFinite
from pleas.guards import (
    check_forwards,
    check_same_function,
    ensemble_obstacles,
    parent_names,
    unmatched_classes,
)
from pleas.layers.layer import Layer, find_layers
from pleas.settings import MergeSettings
from pleas.symmetry import Program, Symmetry, coupled, state_of, trace
from pleas.symmetry.copies import evaluation_copy, plain

DEFAULTS = MergeSettings()
BASE = "base"  # what messages call it
MOST = 16  # parents: owners are bits of a mask, and moments grow with the square


@dataclass(frozen=True, repr=False)
class Parents:
    """Two or more networks of one architecture, and its permutation symmetry.

    names:   what messages call them, in order
    modules: in evaluation mode, frozen: copies of what was given, which stays as it is, weight norms and the like
             folded into the weights
    notes:   what is to be said of them, one sentence each
    example: a batch of images (N, C, H, W) as the networks take them: its values do not matter
    base:    the network that all of them were fine-tuned from, a copy as well, where there is one: units then stay
             where they are unless another place is clearly better, and methods of task vectors can be run
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    symmetry: Symmetry
    example: Tensor = field(repr=False)
    settings: MergeSettings = DEFAULTS
    notes: tuple[str, ...] = ()
    base: nn.Module | None = None

    @classmethod
    def of(
        cls,
        modules: Sequence[nn.Module],
        example: Tensor,
        settings: MergeSettings = DEFAULTS,
        *,
        names: Sequence[str] | None = None,
        symmetry: Symmetry | None = None,
        base: nn.Module | None = None,
    ) -> Parents:
        """Check that `modules` are one architecture with finite weights that computes one function, and trace it.

        names:    for messages; a, b, c ... by default
        symmetry: what `trace` gave for the first, where the caller has it
        base:     the network they were all fine-tuned from; its head may have another number of outputs
        Raises InputError, ArchitectureMismatch, NonFinite, UnsupportedModel.
        """
        names = tuple(names) if names is not None else parent_names(len(modules))
        folded = [plain(module) for module in modules]
        origin = None if base is None else plain(base)
        check_parents(folded, settings, names=names, base=origin)
        frozen = tuple(evaluation_copy(module, share=False).requires_grad_(False) for module in folded)
        symmetry = symmetry or trace(frozen[0], example)
        notes = check_forwards(symmetry.program, frozen, example, names)
        _check_union(frozen, symmetry, settings, names)
        if origin is not None:
            origin = evaluation_copy(origin, share=False).requires_grad_(False)
            called = (names[0], BASE if BASE not in names else f"{BASE} of all")
            notes += check_same_function(symmetry.program, (frozen[0], origin), example, called)
            notes += _other_head(symmetry.program, frozen[0], origin)
        notes = (*notes, *_not_matched(symmetry, settings))
        notes += tuple(
            f"everything kept apart ({len(frozen)}.0x) is not the parents' ensemble: {why}"
            for why in ensemble_obstacles(symmetry)
        )
        return cls(names, frozen, symmetry, example, settings, notes, origin)

    def __repr__(self) -> str:
        kind, units = type(self.modules[0]).__name__, sum(c.size for c in self.symmetry.classes)
        return f"Parents({', '.join(self.names)}: {kind}, {units:,} units in {len(self.symmetry.classes)} classes)"

    @property
    def count(self) -> int:
        return len(self.modules)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The weight layers of the architecture, in graph order."""
        return find_layers(self.symmetry.program)

    @cached_property
    def states(self) -> tuple[dict[str, Tensor], ...]:
        """Every parent's tensors under the names of the graph, in its own unit order."""
        return tuple(state_of(self.symmetry.program, module) for module in self.modules)

    @cached_property
    def base_state(self) -> dict[str, Tensor] | None:
        """The base's tensors under the names of the graph; None where there is no base."""
        return None if self.base is None else state_of(self.symmetry.program, self.base)

    def outputs(self, parent: int) -> int:
        """Outputs of one parent, on an output class."""
        axis = self.symmetry.classes[self.symmetry.output[0]].axes[0]
        return self.states[parent][axis.tensor].shape[axis.dim]


def _check_union(
    modules: Sequence[nn.Module], symmetry: Symmetry, settings: MergeSettings, names: Sequence[str]
) -> None:
    """Raise InputError unless a union of outputs places each output of each parent."""
    if settings.heads != "union":
        return
    places = settings.outputs
    if places is None or len(places) != len(modules):
        given = "none" if places is None else str(len(places))
        raise InputError(
            f"heads = 'union' needs `outputs`, per parent the merged output that each of its outputs is: {given} given "
            f"for {len(modules)} parents"
        )
    if len(symmetry.output) != 1:
        raise InputError("union heads need a model with one output layer; use heads='shared'")
    axis = symmetry.classes[symmetry.output[0]].axes[0]
    for name, module, own in zip(names, modules, places, strict=True):
        size = state_of(symmetry.program, module)[axis.tensor].shape[axis.dim]
        if len(own) != size:
            raise InputError(
                f"outputs has {len(own)} entries for parent {name}, which has {size} outputs: give one each"
            )


def _not_matched(symmetry: Symmetry, settings: MergeSettings) -> tuple[str, ...]:
    """What is to be said of units that activation matching knows nothing of."""
    found = [] if settings.matching == "weight" else unmatched_classes(symmetry)
    if not found:
        return ()
    shown = ", ".join(coupled(unit_class, symmetry.shapes) for unit_class in found[:3])
    return (
        f"no layer reads or writes {len(found)} of the classes of units ({shown}{', ...' if len(found) > 3 else ''}): "
        "activation matching pairs them in the order they stand; matching: weight matches them",
    )


def check_parents(
    modules: Sequence[nn.Module],
    settings: MergeSettings = DEFAULTS,
    *,
    names: Sequence[str] | None = None,
    base: nn.Module | None = None,
) -> None:
    """Raise unless the parents are one architecture with finite weights; where they do not share a head, their last
    tensors may differ in the number of outputs, and those of their base always. Says which pair and which tensors
    differ."""
    names = tuple(names) if names is not None else parent_names(len(modules))
    if not 2 <= len(modules) <= MOST:
        raise InputError(
            f"{len(modules)} parent{'s' * (len(modules) != 1)}: a merge takes 2 to {MOST} networks of one architecture"
        )
    if len(names) != len(modules) or len(set(names)) < len(names):
        raise InputError(
            f"names are {', '.join(names)} for {len(modules)} parents: give each parent a name of its own"
        )
    states = [module.state_dict() for module in modules]
    for name, state in zip(names[1:], states[1:], strict=True):
        _check_pair(names[0], states[0], name, state, settings.heads != "shared")
    called = [f"parent {name}" for name in names]
    if base is not None:
        origin = base.state_dict()
        lines = _unlike(names[0], states[0], "the base", origin, True)
        if lines:
            raise ArchitectureMismatch(
                f"the base is no network that parent {names[0]} was fine-tuned from; tensors that differ:\n  "
                + "\n  ".join(lines)
                + "\nGive the checkpoint that all parents started from, in their own model definition."
            )
        states, called = [*states, origin], [*called, "the base"]
    for name, state in zip(called, states, strict=True):
        for key, value in state.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise NonFinite(f"{name}: weights '{key}' hold NaN or infinity; the checkpoint is damaged")


def _check_pair(
    first: str, own: dict[str, Tensor], second: str, other: dict[str, Tensor], separate: bool
) -> None:
    lines = _unlike(first, own, second, other, separate)
    if not lines:
        return
    hint = (
        " If only the head differs, ask for separate heads or a union (labels: separate or union in a recipe)."
        if not any(line.startswith("only in ") for line in lines)
        else ""
    )
    raise ArchitectureMismatch(
        f"parents {first} and {second} are not one architecture; tensors that differ:\n  "
        + "\n  ".join(lines)
        + f"\nMerge checkpoints of the same model definition.{hint}"
    )


def _unlike(
    first: str, own: dict[str, Tensor], second: str, other: dict[str, Tensor], heads_may_differ: bool
) -> list[str]:
    """What keeps two networks from being one architecture, a line each; nothing where they are."""
    only = [sorted(set(x) - set(y)) for x, y in ((own, other), (other, own))]
    only = [[key for key in keys if not key.endswith("num_batches_tracked")] for keys in only]
    unlike = [key for key, value in own.items() if key in other and value.shape != other[key].shape]
    heads = len(unlike) <= 2 and all(own[key].shape[1:] == other[key].shape[1:] for key in unlike)
    if not any(only) and (not unlike or (heads_may_differ and heads)):
        return []
    lines = [f"only in {first}: {', '.join(only[0][:5])}"] * bool(only[0])
    lines += [f"only in {second}: {', '.join(only[1][:5])}"] * bool(only[1])
    return lines + [
        f"{key}: {tuple(own[key].shape)} in {first}, {tuple(other[key].shape)} in {second}"
        for key in unlike[:8]
    ]


def _other_head(program: Program, parent: nn.Module, base: nn.Module) -> tuple[str, ...]:
    """What is to be said of a base whose head is another."""
    own, other = state_of(program, parent), state_of(program, base)
    unlike = [name for name, value in own.items() if value.shape != other[name].shape]
    if not unlike:
        return ()
    return (
        f"the base has another head than the parents ({', '.join(unlike)}): these tensors have no task vectors, and "
        "methods that need them take the parents' mean there",
    )
