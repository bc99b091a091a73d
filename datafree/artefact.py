"""The folder a merge leaves: it explains itself, and rebuilds the same network from its own files alone.

    model.safetensors   weights; the header holds recipe hash, versions and a hash of the content
    config.json         architecture, plan, input preprocessing, label names per head
    README.md           what it is, how it was made, how to load it
    and whatever the caller adds: recipe, metrics, report

A network of the parents' own class is rebuilt from its timm or torchvision name; any other one from its
graph, which is plain data, so that loading an artefact never runs code that came with it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

import pleas
from datafree.errors import UsageError
from datafree.evaluate import Labels
from datafree.folders import new_folder
from datafree.preprocess import Preprocess
from datafree.rebuild import check_description, fill_own, rebuild
from datafree.references import ARTEFACT_MARK, LIBRARIES
from datafree.report import model_card
from datafree.store import content_hash, plain_tensors, read_safetensors, write_safetensors
from pleas.layout import everyone, owners
from pleas.module import build_network
from pleas.symmetry import coupled, state_of

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


@dataclass(frozen=True)
class Artefact:
    """A loaded artefact: the network in evaluation mode and what its folder says of it."""

    folder: Path
    module: nn.Module
    heads: tuple[Head, ...]
    config: Mapping[str, Any]

    @property
    def preprocess(self) -> Preprocess:
        """How uint8 images (N, C, H, W) become the network's input. Raises UsageError if that was not
        saved.
        """
        found = self.config["input"]
        if found is None:
            raise UsageError(
                f"{self.folder} was saved without preprocessing: pass `preprocess=` to datafree.save"
            )
        height, width = found["size"]
        return Preprocess((height, width), tuple(found["mean"]), tuple(found["std"]), found["interpolation"])

    @property
    def labels(self) -> Labels:
        """ "shared" for one head, "separate" for one per parent."""
        return "shared" if len(self.heads) == 1 else "separate"


def save(
    result: pleas.MergeResult,
    folder: str | Path,
    *,
    name: str = "merged",
    reference: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    preprocess: Preprocess | None = None,
    classes: Sequence[Sequence[str] | None] | None = None,
    license: str | None = None,
    base_models: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:
    """Write a merged network as an artefact folder, whole or not at all, and return the folder.

    reference, arguments: what builds the parents' class, `torchvision:resnet18`; without it the graph is
    saved
    classes: label names of each head
    license, base_models: for the model card, as the Hugging Face Hub names them
    Raises UsageError when the folder exists and `overwrite` is not given, RunError when it cannot be written.
    """
    heads = make_heads(head_sizes(result), result.parents.names, classes)
    description = Description(
        name, heads, reference, arguments or {}, preprocess, license=license, base_models=tuple(base_models)
    )
    _check_plain(description.arguments)
    module = portable(result, reference)
    with new_folder(Path(folder), overwrite=overwrite) as building:
        write_model(building, module, result, description)
        (building / CARD).write_text(model_card(description, result), encoding="utf-8")
    return Path(folder)


def _check_plain(arguments: Mapping[str, Any]) -> None:
    try:
        json.dumps(dict(arguments))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"arguments {dict(arguments)} cannot be written as JSON ({error}): give plain numbers, texts and lists"
        ) from error


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


def portable(result: pleas.MergeResult, reference: str | None) -> nn.Module:
    """The merged module exactly as `load` will rebuild it, in a form that can be rebuilt anywhere.

    A module of the parents' own class stays as it is where timm or torchvision can build it again; one that
    came from a Python file or from a library call becomes the graph it was traced to, because loading never runs
    code that a folder names: `load(folder, model=MyClass)` brings the class back.
    """
    module = result.module
    config = pleas.program_config(module)
    if config is None and reference is not None and reference.startswith(LIBRARIES):
        return module
    if config is None:
        config = pleas.program_config(_as_graph(result))
        assert config is not None
        state = state_of(result.parents.symmetry.program, module)
    else:
        state = module.state_dict()
    # Copied into fresh memory: a stride that is free to choose (a dimension of size 1) would otherwise
    # differ from that of a loaded network, and with it the order of sums.
    rebuilt = pleas.module_from_config(config)
    rebuilt.load_state_dict(state)
    return rebuilt.eval()


def _as_graph(result: pleas.MergeResult) -> pleas.MergedNetwork:
    program = result.parents.symmetry.program
    trainable = {*program.parameters, *program.added}
    state = state_of(program, result.module)
    tensors = {key: (value, key in trainable) for key, value in state.items()}
    return build_network(program.graph, {}, tensors, head_sizes(result), program.notes)


def write_model(
    folder: Path, module: nn.Module, result: pleas.MergeResult, description: Description
) -> dict[str, Any]:
    """Write weights and `config.json` of `module` (as `portable` gave it) into `folder`; returns the
    config.
    """
    network = pleas.program_config(module)
    config = {
        ARTEFACT_MARK: version("datafree"),
        "format": FORMAT,
        "name": description.name,
        "recipe": description.recipe,
        "architecture": {"reference": description.reference, "arguments": dict(description.arguments)},
        "input": None if description.input is None else description.input.to_dict(),
        "heads": [asdict(head) for head in description.heads],
        "flops": {"merged": result.flops, "parent": result.parent_flops, "ratio": result.ratio},
        "parameters": result.parameters,
        "plan": plan_table(result.parents, result.plan),
        **description.details,
        "network": network,
    }
    tensors = plain_tensors(module.state_dict())
    header = {
        "format": "pt",
        "datafree": version("datafree"),
        "torch": torch.__version__,
        "recipe": description.recipe or "",
        "sha256": content_hash(tensors),
    }
    write_safetensors(folder / WEIGHTS, tensors, header)
    (folder / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return config


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


def load(folder: str | Path, *, model: nn.Module | Callable[[], nn.Module] | None = None) -> Artefact:
    """Rebuild the network that `save` or `datafree merge` wrote, in evaluation mode on the CPU.

    Nothing the folder brings is run: a network comes back from its graph, or as a class of timm or torchvision.
    model: the parents' own class (or a module of it, which is filled), where the network at 1.0x is wanted as that
        class: `load(folder, model=MyNet)`, `load(folder, model=lambda: MyNet(width=6))`. Where the folder knows
        its input, the class is compared with the saved graph on noise.

    Raises UsageError for a folder that is not an artefact, is incomplete, or does not have the content it was
    written with, and for a `model` that is not the class which was merged.
    """
    folder = Path(folder)
    config = _read_config(folder)
    state = _read_weights(folder / WEIGHTS)
    path = folder / CONFIG
    module = rebuild(config, state, path) if model is None else fill_own(model, config, state, path)
    heads = tuple(
        Head(head["parents"], head["outputs"], None if head["classes"] is None else tuple(head["classes"]))
        for head in config["heads"]
    )
    return Artefact(folder, module.eval(), heads, config)


def read_card(folder: Path) -> str:
    """The text of the model card. Raises UsageError where it is missing or not a text."""
    path = folder / CARD
    try:
        if not path.is_file():
            raise UsageError(f"{path} is missing or not a file: the artefact is incomplete")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}): the artefact is damaged") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        inside = sorted(item.parent.name for item in folder.glob(f"*/{CONFIG}"))
        if inside:
            raise UsageError(
                f"{folder} holds {len(inside)} artefacts ({', '.join(inside)}): name one, {folder / inside[0]}"
            )
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise UsageError(f"{folder} {what}: give a folder that datafree merge or datafree.save wrote")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): change its permissions") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({error}): the artefact is damaged") from error
    if not isinstance(config, dict) or ARTEFACT_MARK not in config:
        raise UsageError(
            f"{path} was not written by datafree: for other models use a model reference (timm:NAME, ...)"
        )
    if config.get("format") != FORMAT:
        raise UsageError(
            f"{folder} has format {config.get('format')!r:.40}, and this version of datafree reads format "
            f"{FORMAT}: it was written by datafree {config[ARTEFACT_MARK]!s:.40}, install that version"
        )
    check_description(config, path)
    return config


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        header, state = read_safetensors(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} cannot be read ({error}): the artefact is incomplete or damaged") from error
    if header.get("sha256") != content_hash(state):
        raise UsageError(f"{path} does not have the content it was written with: the artefact is damaged")
    return state
