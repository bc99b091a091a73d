"""The list of a folder's proxy shards, which vouches for them: damage to it is found as damage to a shard is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
ENTRY = {"sha256": str, "images": int, "seconds": int | float, "facts": dict}


def manifest_text(content: Mapping[str, Any]) -> str:
    """The JSON of a manifest, with a hash of what it lists."""
    whole = {**content, "check": _hash(content)}
    return json.dumps(whole, indent=1, sort_keys=True, ensure_ascii=False)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """What `manifest_text` was given, or None where there is no such file or not as it was written.

    Manifests of before 0.3 have no hash and are taken as they are.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not isinstance(content.get("shards"), dict):
        return None
    check = content.pop("check", None)
    if check is not None and check != _hash(content):
        return None
    whole = all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in ENTRY.items())
        for entry in content["shards"].values()
    )
    return content if whole else None


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
