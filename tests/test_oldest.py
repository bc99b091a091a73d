"""The promised range of versions is a tested range: pyproject.toml says the oldest, `make test-oldest` runs on them."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

TESTED = {"torch", "torchvision", "timm", "diffusers", "kornia", "transformers"}


@pytest.fixture(scope="module")
def oldest(project: Path) -> dict[str, Version]:
    """Name -> oldest version allowed, as the second environment is told them."""
    command = [sys.executable, project / ".ci" / "oldest.py"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    pairs = [line.split("==") for line in lines]
    return {name: Version(number) for name, number in pairs}


def test_the_constraints_are_the_lower_bounds_of_everything_a_user_installs(
    project: Path, oldest: dict[str, Version]
) -> None:
    declared = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    extras = declared["optional-dependencies"]
    texts = [
        *declared["dependencies"],
        *(one for name in extras for one in extras[name] if name not in ("test", "dev", "docs")),
    ]
    requirements = [Requirement(text) for text in texts]
    assert {one.name for one in requirements} == set(oldest) >= TESTED
    for one in requirements:
        (bound,) = one.specifier
        assert (bound.operator, Version(bound.version)) == (">=", oldest[one.name])


def test_this_environment_has_the_oldest_versions(oldest: dict[str, Version]) -> None:
    if not os.environ.get("DATAFREE_OLDEST"):
        pytest.skip("the oldest versions are tested by `make test-oldest`")
    here = {name: Version(Version(version(name)).base_version) for name in oldest}
    assert here == oldest


def test_ci_tests_the_oldest_versions_and_the_newest(project: Path) -> None:
    commands = [line.split() for line in (project / ".ci" / "run").read_text().splitlines()]
    assert [line[1] for line in commands if line[:1] == ["make"]] == ["lint", "types", "test-oldest", "test"]
