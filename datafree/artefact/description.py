"""What an artefact says of its network: heads, architecture, input, plan; and the names of its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pleas
from datafree.errors import UsageError
from datafree.images.preprocess import Preprocess
from pleas.plan.layout import everyone, owners
from pleas.symmetry import coupled

FORMAT = 1
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


@dataclass(frozen=True)
class Head:
    """One group of outputs: which parents' labels they are, how many, and their names where known."""

    parents: str
    outputs: int
    classes: tuple[str, ...] | None


@dataclass(frozen=True)
class Description:
    """What a saved network says of itself besides its weights.

    reference, arguments: the parents' architecture as a recipe names it; None where the caller did not say
    input:   how uint8 images become its input; None where the caller did not say
    recipe:  fingerprint of the recipe, None for a merge made by a library call
    license, base_models: for the model card: an identifier as the Hugging Face Hub has it ("apache-2.0"), and the
        parents' names there; unknown where not said
    details: anything else worth keeping in `config.json` (parents, settings, ...), JSON-able
    """

    name: str
    heads: tuple[Head, ...]
    reference: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    input: Preprocess | None = None
    recipe: str | None = None
    license: str | None = None
    base_models: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


def head_sizes(result: pleas.MergeResult) -> tuple[int, ...]:
    """Outputs of each head: one number with shared labels, one for each parent with separate ones."""
    if isinstance(result.module, pleas.MergedNetwork):
        return result.module.head_sizes
    output = next(node for node in result.parents.symmetry.program.graph.nodes if node.op == "output")
    return (int(output.args[0].meta["val"].shape[-1]),)


def make_heads(
    sizes: Sequence[int], parents: Sequence[str], classes: Sequence[Sequence[str] | None] | None = None
) -> tuple[Head, ...]:
    """Heads with their label names; raises UsageError where the names do not fit the outputs."""
    names = [None] * len(sizes) if classes is None else list(classes)
    if len(names) != len(sizes):
        raise UsageError(f"classes has {len(names)} entries for {len(sizes)} heads: give one per head")
    whose = (f"{', '.join(parents[:-1])} and {parents[-1]}",) if len(sizes) == 1 else tuple(parents)
    for owner, size, labels in zip(whose, sizes, names, strict=True):
        if labels is not None and len(labels) != size:
            raise UsageError(
                f"the head of {owner} has {size} outputs, but {len(labels)} label names were given"
            )
    return tuple(
        Head(owner, size, None if labels is None else tuple(labels))
        for owner, size, labels in zip(whose, sizes, names, strict=True)
    )


def plan_table(parents: pleas.Parents, plan: pleas.Plan) -> list[dict[str, Any]]:
    """Per class of units: how many all parents share, how many they do not, whose the merged units are, and why where
    none may be kept apart."""
    rows, symmetry = [], parents.symmetry
    for index, unit_class in enumerate(symmetry.classes):
        chosen = plan.classes[index]
        counts = Counter(chosen.masks.tolist())
        fused = counts[everyone(parents.count)]
        owned = {
            " + ".join(parents.names[p] for p in owners(mask)): count
            for mask, count in sorted(counts.items())
        }
        rows.append(
            {
                "class": unit_class.name,
                "kind": unit_class.kind,
                "units": unit_class.size,
                "fused": fused,
                "apart": unit_class.size - fused,
                "owners": owned,
                "width": chosen.width,
                "reason": "" if unit_class.widenable else unit_class.reason,
                "couples": coupled(unit_class, symmetry.shapes).split(" - "),
            }
        )
    return rows
