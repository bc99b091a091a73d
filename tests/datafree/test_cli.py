"""The command line: quick help, exit codes, one message for what was meant, a traceback for what was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import pleas
from datafree.cli import main
from datafree.errors import RunError, UsageError
from datafree.offline import is_offline


def _invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_help_lists_the_commands() -> None:
    command = Path(sys.executable).with_name("datafree")
    assert command.is_file(), "the package must be installed: pip install -e ."
    output = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
    listed = [line.split()[0] for line in output.split("Commands:")[1].splitlines() if line.strip()]
    assert listed == ["check", "plan", "merge", "diagnose", "proxy", "inspect", "eval", "env"]


@pytest.mark.parametrize("command", ["check", "plan", "merge", "diagnose", "proxy", "inspect", "eval", "env"])
def test_every_command_explains_itself(command: str) -> None:
    result = _invoke(command, "--help")
    assert result.exit_code == 0
    assert result.output.startswith("Usage: ")


def test_version() -> None:
    assert _invoke("--version").output.startswith("datafree 0.")
    module = subprocess.run(
        [sys.executable, "-m", "datafree", "--version"], capture_output=True, text=True, check=True
    )
    assert module.stdout == _invoke("--version").output


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("wrong key"), 2),
        (RunError("the disk is full"), 1),
        (pleas.InputError("the parents differ"), 2),
        (pleas.MergeFailed("a Gram matrix is singular"), 1),
    ],
)
def test_errors_raised_on_purpose_are_one_message_and_a_code(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(as_json: bool) -> None:
        raise error

    monkeypatch.setattr("datafree.commands.env.run", fail)
    result = _invoke("env")
    assert result.exit_code == code
    assert result.stderr == f"error: {error}\n"
    assert result.stdout == ""


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(as_json: bool) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("datafree.commands.env.run", fail)
    result = _invoke("env")
    assert isinstance(result.exception, ZeroDivisionError)
    assert result.exit_code == 1


@pytest.mark.parametrize("before", [None, "0"])
def test_offline_holds_for_the_command_and_no_longer(
    before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("datafree.commands.check.run", lambda *given: seen.append(is_offline()))
    if before is None:
        monkeypatch.delenv("DATAFREE_OFFLINE", raising=False)
    else:
        monkeypatch.setenv("DATAFREE_OFFLINE", before)
    assert _invoke("check", "some.yaml", "--offline").exit_code == 0
    assert _invoke("check", "some.yaml").exit_code == 0
    assert seen == [True, False]
    assert os.environ.get("DATAFREE_OFFLINE") == before


@pytest.mark.parametrize("command", ["check", "plan", "merge", "diagnose"])
def test_a_missing_recipe(command: str, tmp_path: Path) -> None:
    result = _invoke(command, tmp_path / "absent.yaml")
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path}/absent.yaml: no such recipe; give the path of a .yaml file\n"


def test_env_tells_versions_and_the_cache() -> None:
    text = _invoke("env").output
    assert "torch " in text
    facts = json.loads(_invoke("env", "--json").output)
    assert set(facts) == {"versions", "machine", "cache"}
    assert facts["cache"]["folder"] in text
