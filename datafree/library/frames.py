"""Tables for pandas, which is not needed for anything else."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from datafree.errors import UsageError


def frame_of(rows: Sequence[dict[str, Any]]) -> Any:
    """A pandas.DataFrame, one row each. Raises UsageError where pandas is not installed."""
    try:
        pandas = import_module("pandas")
    except ImportError as error:
        raise UsageError(
            "to_frame() makes a pandas.DataFrame, and pandas is not installed: pip install pandas, or read rows(), "
            "which are plain dictionaries"
        ) from error
    return pandas.DataFrame(list(rows))
