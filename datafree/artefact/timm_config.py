"""A network of timm's own class is saved so that timm loads the folder too: `timm.create_model("local-dir:FOLDER",
pretrained=True)`, and from the Hub once it was pushed there.

timm reads `architecture` as the name of a model; what this tool has under that key then stands under OWN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from datafree.images.preprocess import Preprocess

if TYPE_CHECKING:
    from datafree.artefact.description import Head

OWN = "built_by"
_KEPT = ("pool_size", "crop_pct", "crop_mode", "fixed_input_size", "first_conv", "classifier", "num_features")


def as_timm(
    module: nn.Module,
    reference: str,
    arguments: Mapping[str, Any],
    input: Preprocess | None,
    heads: Sequence[Head],
) -> dict[str, Any]:
    """What timm reads in a config.json, and our own description of the architecture beside it."""
    known = dict(getattr(module, "pretrained_cfg", None) or {})
    pretrained: dict[str, Any] = {key: known[key] for key in _KEPT if known.get(key) is not None}
    if input is not None:
        pretrained |= {"input_size": list(input.shape), "mean": list(input.mean), "std": list(input.std)}
        pretrained |= {"interpolation": input.interpolation, "crop_pct": 1.0}
    classes = heads[0].classes
    return {
        "architecture": reference.removeprefix("timm:").partition(".")[0],
        "num_classes": heads[0].outputs,
        **({"label_names": list(classes)} if classes else {}),
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "pretrained_cfg": {**pretrained, "num_classes": heads[0].outputs},
        OWN: {"reference": reference, "arguments": dict(arguments)},
    }


def own_architecture(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json as this tool reads it, whoever else may read it."""
    if isinstance(config.get("architecture"), str) and OWN in config:
        return {**config, "architecture": config[OWN]}
    return config
