"""Merge two trained vision networks into one without their training data.

    result = pleas.merge(a, b, inputs, budget=1.25)      # the mathematics, no files
    datafree.save(result, "out")                         # an artefact folder that explains itself and reloads
    model = datafree.load("out").module

The names below are imported on first use, so that `import datafree` (and the command line) does not import
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datafree.artefact.load import Artefact, load
    from datafree.artefact.save import save
    from datafree.pipeline import run

    __version__: str

__all__ = ["Artefact", "__version__", "load", "run", "save"]

_HOME = {
    "Artefact": "artefact.load",
    "load": "artefact.load",
    "save": "artefact.save",
    "run": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("datafree")
    if name not in _HOME:
        raise AttributeError(f"module 'datafree' has no attribute {name!r}")
    return getattr(importlib.import_module(f"datafree.{_HOME[name]}"), name)
