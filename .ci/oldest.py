"""Print the oldest versions that pyproject.toml allows, as a pip constraints file: `python .ci/oldest.py`.

pyproject.toml is the only place where a lower bound stands; the second environment of `make test-oldest` is built from
what is printed here.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)\s*>=\s*(?P<oldest>[0-9][0-9.]*)")
NOT_OURS = {"test", "dev", "docs"}  # tools that no user installs: their newest versions are used


def oldest(project: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, lower bound) of every dependency of the package and of its extras."""
    extras = project["optional-dependencies"]
    groups = [project["dependencies"], *(extras[name] for name in extras if name not in NOT_OURS)]
    for requirement in (one for group in groups for one in group):
        if requirement.startswith(f"{project['name']}["):
            continue  # an extra made of other extras
        match = REQUIREMENT.fullmatch(requirement)
        if match is None:
            raise SystemExit(
                f"{PYPROJECT}: '{requirement}' is not of the form name>=version: give a lower bound alone"
            )
        yield match["name"], match["oldest"]


def main() -> None:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    sys.stdout.writelines(f"{name}=={version}\n" for name, version in oldest(project))


if __name__ == "__main__":
    main()
