"""Five hundred spoiled recipes: each is taken or refused, with a place, and none costs time or memory."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from datafree.cli import main
from datafree.errors import UsageError
from datafree.recipe.file import load_recipe
from tests.datafree.recipe.recipe_mutants import mutant
from tests.datafree.tiny import RECIPE, make_tiny

MUTANTS = 500
MEMORY = 2 * 1024**3  # bytes that a refusal may take, the interpreter and torch included


def shipped(project: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted((project / "recipes").glob("*.yaml"))]


def refusal(path: Path) -> str | None:
    try:
        load_recipe(path)
    except UsageError as error:
        return str(error)
    return None


@pytest.mark.timeout(120)
def test_every_spoiled_recipe_is_taken_or_refused_with_its_place(tmp_path: Path, project: Path) -> None:
    path, texts = tmp_path / "spoiled.yaml", shipped(project)
    located = re.compile(rf"^{re.escape(str(path))}:[0-9]+:[0-9]+: .")
    refused = 0
    for number in range(MUTANTS):
        path.write_bytes(mutant(texts[number % len(texts)], number))
        message = refusal(path)
        refused += message is not None
        assert message is None or located.match(message), f"mutant {number}: {message}"
        assert len(message or "") < 20_000, f"mutant {number}"
    assert 0.5 * MUTANTS < refused < 0.95 * MUTANTS  # the changes are neither all harmless nor all fatal


@pytest.mark.timeout(120)
def test_check_refuses_spoiled_recipes_without_a_traceback(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path)
    for number in range(25):
        tiny.recipe.write_bytes(mutant(RECIPE, number))
        result = CliRunner().invoke(main, ["check", str(tiny.recipe)])
        assert result.exit_code in (0, 2), f"mutant {number}: {result.output}"
        assert result.exit_code == 0 or result.stderr.startswith(f"error: {tiny.recipe}:"), f"mutant {number}"


BOMBS = {
    "nested": ("x: " + "[" * 900 + "]" * 900, "nested more than 50 levels deep: no recipe is"),
    "nested-by-aliases": (
        "\n".join(["x0: &x0 1"] + [f"x{n}: &x{n} {'[' * 30}*x{n - 1}{']' * 30}" for n in (1, 2)]),
        "with its aliases this is nested more than 50 levels deep: no recipe is",
    ),
    "aliases": (
        "\n".join(
            ["x0: &x0 [lol]"] + [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 12)]
        ),
        "with its aliases this text has more than 100,000 values: no recipe has",
    ),
    "digits": (
        "x: " + "9" * 4000,
        "1:4: the number 9999999999999999999999999999999999999... does not fit in 64 bits",
    ),
    "size": ("x: " + "a" * 1_000_000, "1:1: the text has 1,000,003 characters; a recipe has at most 500,000"),
    "keys": ("\n".join(f"k{n}: 1" for n in range(20_000)), "more: mend these first"),
}


REFUSE = """\
import sys
from click.testing import CliRunner
from datafree.cli import main
for path in sys.argv[1:]:
    result = CliRunner().invoke(main, ["check", path])
    assert result.exit_code == 2, result.exception
    print(result.stderr.removeprefix("error: "), end="")
"""


def test_what_would_fill_the_memory_is_refused_in_little(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.yaml" for name in BOMBS]
    for path, (text, _) in zip(paths, BOMBS.values(), strict=True):
        path.write_text(text)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))

    done = subprocess.run(
        [sys.executable, "-c", REFUSE, *map(str, paths)],
        capture_output=True, text=True, check=False, timeout=120, preexec_fn=limit,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for path, (_, message) in zip(paths, BOMBS.values(), strict=True):
        assert f"{path}:" in done.stdout
        assert message in done.stdout, path


def test_merged_mappings_that_multiply_are_only_what_they_say(tmp_path: Path) -> None:
    lines = ["x0: &x0 {a: 1}"] + [
        f"x{n}: &x{n} {{<<: [{', '.join([f'*x{n - 1}'] * 9)}]}}" for n in range(1, 40)
    ]
    path = tmp_path / "merged.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(UsageError, match=r"merged\.yaml:1:1: x0: unknown key"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "parents.a.weights=null",
            "parents.a: parent a: python:net.py:net has no weights: give `weights: FILE`",
        ),
        ("parents.a.preprocess.size=1000000", "size is 1000000: at most 4,096 pixels a side are taken"),
        ("parents.a.preprocess.size=1e6", "parents.a.preprocess.size: must be a whole number, not 1000000.0"),
        ("evaluate.0.label_offset=1e20", "evaluate.0.label_offset: must be a whole number, not 1e+20"),
        ("evaluate.0.label_offset=9223372036854775807", "and the smallest label is 0: lower the offset"),
        (
            "proxy.count=1000000000000",
            "proxy.count: must be less than or equal to 10000000, not 1000000000000",
        ),
        ("parents.a.weights=" + "x" * 5000, "xxx...' can be no path (File name too long): give another"),
        (
            'evaluate.0.images={folder: "a\\0b"}',
            "'a\\x00b' can be no path (embedded null byte): give another",
        ),
    ],
)
def test_extreme_values_are_the_users_mistake(setting: str, message: str, tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path)
    result = CliRunner().invoke(main, ["check", str(tiny.recipe), "--set", setting])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
