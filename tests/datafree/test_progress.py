"""Progress: timings always, lines in a pipe, a bar in a terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

import datafree.progress
from datafree.cli import main
from datafree.errors import UsageError
from datafree.progress import (
    BarProgress,
    LineProgress,
    LoggedProgress,
    StageProgress,
    TerminalProgress,
    bar_on,
    progress_on,
)


def test_timings_add_up_over_stages_of_one_name() -> None:
    progress = StageProgress()
    for _ in range(2):
        with progress.stage("plan"):
            progress("plan", 1, 2)
    with progress.stage("report"):
        progress.note("seen")
    assert list(progress.timings) == ["plan", "report"]
    assert progress.notes == ["seen"]
    if sys.platform != "win32":
        assert 1 < progress.memory["plan"] <= progress.memory["report"] < 1e6


def test_a_pipe_gets_one_line_per_stage() -> None:
    stream = io.StringIO()
    with progress_on(stream) as progress:
        assert isinstance(progress, LineProgress)
        with progress.stage("statistics"):
            for step in range(100):
                progress("statistics", step, 100)
            progress.note("one unit is dead")
        with pytest.raises(KeyError), progress.stage("plan"):
            raise KeyError
    lines = stream.getvalue().splitlines()
    assert lines[0] == "note: one unit is dead"
    assert lines[1].split() == ["statistics", "0.0", "s"]
    assert lines[2].split() == ["plan", "0.0", "s", "(stopped)"]
    assert "plan" not in progress.timings


def test_a_terminal_gets_a_line_per_stage_too() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80)
    with TerminalProgress(console) as progress, progress.stage("statistics"):
        progress("second moments", 3, 10)
        progress.note("[brackets] are not markup")
    assert "statistics" in stream.getvalue()
    assert "[brackets] are not markup" in stream.getvalue()


def test_a_long_stage_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr(datafree.progress.time, "monotonic", lambda: now[0])
    progress = LineProgress(stream, every=30)
    with progress.stage("proxies"):
        for step in range(7):
            now[0] += 10
            progress("proxy", step, 7)
    assert stream.getvalue().splitlines()[:2] == [
        "proxies: proxy 2/7 after 30 s",
        "proxies: proxy 5/7 after 60 s",
    ]


def asked(*options: str) -> StageProgress:
    """What a command with these options shows its progress on."""
    command = main.commands["check"]
    context = command.make_context("check", ["x.yaml", *options], parent=click.Context(main))
    with context.scope():
        return progress_on(io.StringIO())


def test_commands_are_quiet_talkative_and_keep_a_file(tmp_path: Path) -> None:
    assert type(asked("-q")) is StageProgress
    assert type(asked()) is LineProgress
    talkative = asked("-v")
    assert isinstance(talkative, LineProgress)
    with talkative.stage("plan"):
        assert talkative._stream.getvalue() == "plan begins\n"  # type: ignore[attr-defined]
    with pytest.raises(click.UsageError, match="-q and -v are given together"):
        asked("-v", "-q")
    log = tmp_path / "log.txt"
    for _ in range(2):
        kept = asked("-q", "--log-file", str(log))
        assert isinstance(kept, LoggedProgress)
        with pytest.raises(KeyError), kept, kept.stage("plan"):
            raise KeyError(kept.note("seen") or "lost")
        assert kept.notes == ["seen"]
    lines = [line[20:] for line in log.read_text().splitlines()]
    assert [line.split("  ")[0] for line in lines[:3]] == ["plan begins", "note: seen", "plan"]
    assert log.read_text().count("stopped: KeyError: 'lost'") == 2
    with pytest.raises(UsageError, match=r"--log-file .*cannot be written .*: name another"):
        asked("--log-file", str(tmp_path / "none" / "log.txt"))


def test_every_command_on_a_recipe_takes_them() -> None:
    for name, command in main.commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        works = any(parameter.name == "recipe" for parameter in command.params)
        assert ({"-q", "-v", "--log-file"} <= options) == works, name


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete(shell: str) -> None:
    done = CliRunner().invoke(main, prog_name="datafree", env={"_DATAFREE_COMPLETE": f"{shell}_source"})
    assert "_datafree_completion" in done.output


def test_one_run_of_many_leaves_no_line_behind() -> None:
    stream = io.StringIO()
    with (
        BarProgress(Console(file=stream, force_terminal=True, width=80)) as progress,
        progress.stage("statistics"),
    ):
        progress("second moments", 3, 10)
        progress.note("one unit is dead")
    assert progress.notes == ["one unit is dead"]
    assert list(progress.timings) == ["statistics"]
    assert "dead" not in stream.getvalue()
    assert "✓" not in stream.getvalue()
    assert type(bar_on(io.StringIO())) is StageProgress
