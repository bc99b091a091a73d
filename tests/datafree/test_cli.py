"""The command line: quick help, exit codes, one message for what was meant, a traceback for what was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import pleas
from datafree.cli import main
from datafree.errors import RunError, UsageError
from datafree.offline import is_offline
from datafree.stages import choose_device
from tests.datafree.tiny import make_tiny


def _invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_help_lists_the_commands() -> None:
    command = Path(sys.executable).with_name("datafree")
    assert command.is_file(), "the package must be installed: pip install -e ."
    output = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
    listed = [line.split()[0] for line in output.split("Commands:")[1].splitlines() if line.strip()]
    assert listed == [
        "check",
        "plan",
        "merge",
        "diagnose",
        "proxy",
        "ablate",
        "inspect",
        "eval",
        "methods",
        "env",
    ]


@pytest.mark.parametrize(
    "command", ["check", "plan", "merge", "diagnose", "proxy", "ablate", "inspect", "eval", "methods", "env"]
)
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


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:1", "cuda:", "cuda:-1", "cuda:99999"])
def test_devices_that_are_none(device: str) -> None:
    result = _invoke("check", "some.yaml", "--device", device)
    assert result.exit_code == 2
    assert f"'{device}' is none of auto, cpu, cuda, cuda:0, cuda:1, ..." in result.stderr


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1"):
        with pytest.raises(
            UsageError, match=f"^--device {name}: this PyTorch sees no CUDA device; use --device cpu"
        ):
            choose_device(name)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("cuda") == choose_device("auto") == torch.device("cuda")
    with pytest.raises(UsageError) as caught:
        choose_device("cuda:2")
    assert str(caught.value) == (
        "--device cuda:2: this PyTorch sees cuda:0 to cuda:1; use one of these, or --device cpu"
    )
    with pytest.raises(
        UsageError, match=r"^--device tpu: give auto, cpu, cuda, or one of several GPUs as cuda:0"
    ):
        choose_device("tpu")


def test_merge_and_proxy_print_json(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "tiny")
    result = _invoke("merge", tiny.recipe, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["folder"] == str(tmp_path / "out")
    assert all((Path(artefact) / "model.safetensors").is_file() for artefact in said["artefacts"])
    assert len(said["artefacts"]) == 2
    assert said["metrics"] == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert Path(said["report"]).is_file()
    result = _invoke("proxy", tiny.recipe, "-o", tmp_path / "look", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["count"], said["images"], said["sources"][0]["kind"]) == (64, None, "noise")
    assert all(Path(place).is_file() for place in (*said["sheets"], said["statistics"]))
