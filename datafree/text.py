"""How our files and `--json` spell values."""

from __future__ import annotations

import json
from typing import Any


def json_text(value: Any) -> str:
    """JSON as all our files spell it."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
