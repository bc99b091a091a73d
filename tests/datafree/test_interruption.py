"""Ctrl-C and SIGTERM: what is kept and how to go on, in one message; nothing half-written stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from datafree.cache.store import CACHE_VARIABLE
from datafree.cli import main
from tests.datafree.tiny import make_tiny

STAGES = "interrupted: the stages and proxy images that were finished are kept in {cache}"
KEPT = f"{STAGES}; the output folder was not touched"
CELLS = f"{STAGES}, the finished cells and their rows in the output folder"
AGAIN = ". Run the same command again to go on from there\n"


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("merge", ["-o", "OUT"], KEPT + AGAIN),
        ("proxy", ["-o", "OUT"], KEPT + AGAIN),
        ("plan", [], STAGES + AGAIN),
        ("ablate", ["-o", "OUT"], CELLS + AGAIN),
        ("diagnose", [], STAGES + AGAIN),
        ("check", [], "interrupted: nothing was changed\n"),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_said(
    command: str,
    options: list[str],
    message: str,
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)  # the signal arrives at once, between two instructions

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(f"datafree.commands.{command}.run", interrupt)
    before = signal.getsignal(signal.SIGTERM)
    result = CliRunner().invoke(main, [command, "some.yaml", *options])
    assert result.exit_code == 128 + number
    assert result.stderr == message.format(cache=tmp_path / "cache")
    assert result.stdout == ""
    assert signal.getsignal(signal.SIGTERM) is before


INTERRUPTED = """\
import os, signal, sys
from datafree import pipeline
from datafree.cli import main
number, real = int(sys.argv.pop()), pipeline.make_plans
def stop(*given):
    os.kill(os.getpid(), number)
    return real(*given)
pipeline.make_plans = stop
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_merge_that_was_interrupted_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    tiny, out = make_tiny(tmp_path / "tiny"), tmp_path / "out"
    project = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, CACHE_VARIABLE: str(tmp_path / "cache"), "PYTHONPATH": project}
    command = ["merge", str(tiny.recipe), "-o", str(out)]
    stopped = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *command, str(int(number))],
        capture_output=True, text=True, check=False, env=environment, timeout=120,
    )  # fmt: skip
    assert stopped.returncode == 128 + number, stopped.stderr
    assert stopped.stderr.endswith(KEPT.format(cache=tmp_path / "cache") + AGAIN)
    assert "Traceback" not in stopped.stderr
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "tiny"]
    assert list((tmp_path / "cache").rglob("*.safetensors"))
    done = CliRunner(env=environment).invoke(main, command)
    assert done.exit_code == 0, done.output
    assert (out / "metrics.json").is_file()
