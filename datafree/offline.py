"""Whether anything may be fetched from the network: never under `--offline`, whatever a recipe allows."""

from __future__ import annotations

import os

OFFLINE_VARIABLE = "DATAFREE_OFFLINE"


def is_offline() -> bool:
    """True under `--offline`, and where the environment sets DATAFREE_OFFLINE to anything but 0."""
    return os.environ.get(OFFLINE_VARIABLE, "") not in ("", "0")
