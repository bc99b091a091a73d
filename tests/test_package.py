"""The shape of the project: what may import what, what the help costs, where the version stands."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import datafree
from datafree.cli import main

MATHEMATICS = {"pleas", "torch", "scipy", "numpy"}  # numpy: the arrays that scipy takes and gives


def imported(path: Path) -> set[str]:
    """Top-level names of every import in a file, wherever it stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add((node.module or "").partition(".")[0])
    return names


def test_pleas_imports_torch_scipy_and_the_standard_library_only(project: Path) -> None:
    allowed = MATHEMATICS | set(sys.stdlib_module_names)
    for path in sorted((project / "pleas").rglob("*.py")):
        assert imported(path) <= allowed, path


def test_pleas_opens_prints_and_downloads_nothing(project: Path) -> None:
    for path in sorted((project / "pleas").rglob("*.py")):
        assert not imported(path) & {
            "pathlib",
            "os",
            "shutil",
            "tempfile",
            "urllib",
            "requests",
        }, path
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert not names & {"open", "print"}, path
        if "logging" in imported(path):  # to quieten others, never to log
            calls = {
                node.func.attr
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            }
            assert not calls & {"debug", "info", "warning", "error", "exception", "critical", "log"}, path


def test_nothing_installed_imports_tests_or_benchmarks(project: Path) -> None:
    for package in ("pleas", "datafree"):
        for path in sorted((project / package).rglob("*.py")):
            assert not imported(path) & {"tests", "benchmarks"}, path


def test_the_version_stands_in_one_place(project: Path) -> None:
    declared = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    assert version("datafree") == datafree.__version__ == declared["version"]
    source = (project / "datafree" / "__init__.py").read_text()
    assert declared["version"] not in source
    assert f"## {datafree.__version__}" in (project / "CHANGELOG.md").read_text()


def test_every_declared_dependency_is_imported_and_every_import_declared(project: Path) -> None:
    declared = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    modules = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
    needs = {requirement.partition(">=")[0].lower() for requirement in declared["dependencies"]}
    needed = {modules.get(name, name) for name in needs}
    optional = {"sklearn", "onnx", "onnxscript", "webdataset"}
    used = set[str]()
    for package in ("pleas", "datafree"):
        for path in (project / package).rglob("*.py"):
            used |= imported(path)
    assert used - set(sys.stdlib_module_names) - {"pleas", "datafree"} <= needed | optional


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)


LOADED = """
import sys
{code}
print("loaded:", *sys.modules)
"""
COMMAND = """
from datafree.cli import main
try:
    main({arguments})
except SystemExit as end:
    assert not end.code, end.code
"""


def loaded(code: str) -> set[str]:
    """Top-level names of the modules outside the standard library that a fresh Python has loaded after `code`."""
    last = run("-c", LOADED.format(code=code)).stdout.splitlines()[-1]
    names = {name.partition(".")[0] for name in last.removeprefix("loaded: ").split()}
    return names - set(sys.stdlib_module_names) - {"__main__", "__mp_main__"}


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["-h"], ["--version"], *([name, "--help"] for name in main.commands)],
    ids=" ".join,
)
def test_help_and_version_load_click_and_nothing_else(arguments: list[str]) -> None:
    """What makes help instant, counted: seconds depend on who else uses the machine."""
    bare = loaded("pass")  # what this environment loads into every Python
    assert loaded(COMMAND.format(arguments=arguments)) - bare == {"click", "datafree"}


def test_importing_datafree_loads_nothing_else() -> None:
    assert loaded("import datafree") - loaded("pass") == {"datafree"}


def test_every_public_name_is_listed_and_is_there() -> None:
    """Names are imported on first use, so a file that moved is noticed here."""
    assert set(datafree.__all__) <= set(dir(datafree))
    for name in datafree.__all__:
        assert getattr(datafree, name)
    with pytest.raises(AttributeError, match="module 'datafree' has no attribute 'mrege'"):
        _ = datafree.mrege  # type: ignore[attr-defined]


def test_env_renders_no_template_and_draws_nothing() -> None:
    command = COMMAND.format(arguments=["env", "--json"])
    heavy = {"jinja2", "matplotlib", "timm", "diffusers", "kornia", "torchvision"}
    assert loaded(command) & heavy <= loaded("import torch")  # torch itself may load jinja2


@pytest.mark.parametrize("name", ["quickstart", "test", "test-all", "test-oldest", "lint", "types", "docs"])
def test_the_makefile_knows_the_commands_the_readme_names(project: Path, name: str) -> None:
    done = subprocess.run(["make", "-n", name], cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
