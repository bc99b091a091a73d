"""The block at the top of a model card that the Hugging Face Hub reads, and text that may leave this machine."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from datafree.artefact.description import Description
    from datafree.evaluation.results import Results, Row

UNKNOWN_LICENSE = "unknown"
_PATH = re.compile(
    r"(?<![\w./~])(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?:[^\s'\"`,;:()|]*[/\\])*(?=[^\s'\"`,;:()|/\\])"
)


def without_paths(text: str) -> str:
    """`text` with the last part of every path alone: `/home/me/net.py` is `net.py`. Relative names stay."""
    return _PATH.sub("", text)


def reference_name(reference: str) -> str:
    """A model reference as it may be published: without the folders of a file."""
    kind, colon, rest = reference.partition(":")
    if kind == "python" and ".py:" in rest:
        place, _, name = rest.rpartition(":")
        return f"python:{PurePath(place.replace(chr(92), '/')).name}:{name}"
    if kind == "local-dir":
        return f"local-dir:{PurePath(rest).name}"
    return f"{kind}{colon}{without_paths(rest)}"


def own_row(description: Description, results: Results) -> Row | None:
    """The row of the table that is the network in this folder: the refined one where there is one."""
    point = description.details.get("point")
    rows = [
        row
        for row in results.rows
        if row.kind in ("merged", "refined")
        and row.point is not None
        and (point is None or {"kind": row.point.kind, "value": row.point.value} == dict(point))
    ]
    if point is None and len({row.point for row in rows}) != 1:
        return None
    return next((row for row in rows if row.kind == "refined"), rows[0] if rows else None)


def metadata(description: Description, results: Results | None = None) -> str:
    """YAML between the lines of dashes, as `huggingface_hub.ModelCard` reads it.

    `base_model` has names on the Hub alone: those that the caller gave, or timm's published weights.
    """
    content: dict[str, Any] = {
        "license": description.license or UNKNOWN_LICENSE,
        "library_name": "datafree",
        "pipeline_tag": "image-classification",
        "tags": ["datafree", "merge", "model-merging", "image-classification"],
    }
    bases = list(description.base_models) or _published(description)
    if bases:
        content |= {"base_model": bases, "base_model_relation": "merge"}
    row = None if results is None else own_row(description, results)
    if row is not None and row.evaluation.tasks:
        content["metrics"] = ["accuracy"]
        content["model-index"] = [
            {"name": description.name, "results": [_result(score) for score in row.evaluation.tasks]}
        ]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _result(score: Any) -> dict[str, Any]:
    return {
        "task": {"type": "image-classification", "name": "Image Classification"},
        "dataset": {"type": score.task, "name": score.task},
        "metrics": [{"type": "accuracy", "name": "Accuracy", "value": round(score.accuracy, 6)}],
    }


def _published(description: Description) -> list[str]:
    """Names on the Hub of timm's published weights, where all parents are such."""
    parents = list(description.details.get("parents", {}).values())
    timm = [
        parent["reference"].removeprefix("timm:")
        for parent in parents
        if parent["reference"].startswith("timm:")
    ]
    published = len(timm) == len(parents) and all(parent.get("pretrained") for parent in parents)
    return [f"timm/{name}" for name in dict.fromkeys(timm)] if published else []
