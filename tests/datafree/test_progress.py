"""Progress: timings always, lines in a pipe, a bar in a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from datafree.progress import BarProgress, LineProgress, StageProgress, TerminalProgress, bar_on, progress_on


def test_timings_add_up_over_stages_of_one_name() -> None:
    progress = StageProgress()
    for _ in range(2):
        with progress.stage("plan"):
            progress("plan", 1, 2)
    with progress.stage("report"):
        progress.note("seen")
    assert list(progress.timings) == ["plan", "report"]
    assert progress.notes == ["seen"]


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
