"""What a run shows while it works: a live bar in a terminal, lines elsewhere, nothing in a library.

On the command line `-q` shows nothing, `-v` lines also in a terminal and more of them, `--log-file` writes them to a
file as well.

`pleas` and the proxy sources report through a plain call `progress(stage, done, total)`; the conductor
opens and closes the stages. Stage names are the ones the report and the documentation use.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TextIO

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from datafree.environment import peak_memory
from datafree.errors import UsageError
from datafree.tables import wrapped

EVERY, OFTEN = 30.0, 5.0  # seconds between the lines of a long stage
QUIET, VERBOSE, LOG_FILE = (
    "datafree.quiet",
    "datafree.verbose",
    "datafree.log_file",
)  # in the context of a command


class StageProgress:
    """Times the stages and shows nothing; the others derive from it.

    timings: stage -> seconds, summed when a stage opens more than once
    memory:  stage -> the most memory that the process had held when it ended, MiB
    notes:   what was worth saying, in order
    """

    def __init__(self) -> None:
        self.timings: dict[str, float] = {}
        self.memory: dict[str, float] = {}
        self.notes: list[str] = []

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close here; a live display overrides this."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` parts of the current stage are finished; `stage` names the step inside it."""

    @contextmanager
    def stage(self, name: str) -> Iterator[StageProgress]:
        start = time.perf_counter()
        self._open(name)
        try:
            yield self
        except BaseException:
            self._close(name, time.perf_counter() - start, finished=False)
            raise
        seconds = time.perf_counter() - start
        self.timings[name] = self.timings.get(name, 0.0) + seconds
        peak = peak_memory()
        if peak is not None:
            self.memory[name] = peak
        self._close(name, seconds, finished=True)

    def note(self, text: str) -> None:
        """Something the user should read now and find in `run.json` later."""
        self.notes.append(text)

    def _open(self, name: str) -> None:
        """A stage begins."""

    def _close(self, name: str, seconds: float, finished: bool) -> None:
        """A stage ends."""


class LineProgress(StageProgress):
    """One line per finished stage, for logs and pipes; and one every so many seconds of a long stage.

    every: seconds between lines    starts: a stage is also named when it begins    dated: the time stands before a line
    """

    def __init__(
        self, stream: TextIO, *, every: float = EVERY, starts: bool = False, dated: bool = False
    ) -> None:
        super().__init__()
        self._stream, self._every, self._starts, self._dated = stream, every, starts, dated
        self._stage, self._since, self._last = "", 0.0, 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= self._every:
            step = f" {stage}" if stage != self._stage else ""
            of = f"/{total}" if total else ""
            self._write(f"{self._stage}:{step} {done}{of} after {now - self._since:.0f} s")

    def note(self, text: str) -> None:
        super().note(text)
        self._write(f"note: {text}")

    def _open(self, name: str) -> None:
        self._stage, self._since = name, time.monotonic()
        self._last = self._since
        if self._starts:
            self._write(f"{name} begins")

    def _close(self, name: str, seconds: float, finished: bool) -> None:
        self._write(f"{name:<14} {seconds:8.1f} s{'' if finished else '  (stopped)'}")

    def _write(self, line: str) -> None:
        self._last = time.monotonic()
        before = time.strftime("%Y-%m-%d %H:%M:%S ") if self._dated else ""
        self._stream.write(f"{before}{line}\n")
        self._stream.flush()


class TerminalProgress(StageProgress):
    """A live bar for the stage at work, and a line for each one that is done."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[stage]:<14}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.description}", style="dim"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, stage="", visible=False)

    def __enter__(self) -> StageProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total, description=stage)

    def note(self, text: str) -> None:
        super().note(text)
        said = wrapped(
            f"note: {text}", self._console.width
        )  # rich would break a path that is longer than a line
        self._console.print(said, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def _open(self, name: str) -> None:
        self._bar.reset(self._task, total=None, stage=name, description="", visible=True)

    def _close(self, name: str, seconds: float, finished: bool) -> None:
        self._bar.update(self._task, visible=False)
        mark, style = ("✓", "green") if finished else ("✗", "red")
        if not self._console.encoding.lower().startswith("utf"):
            mark = "+" if finished else "-"
        self._console.print(f"{mark} {name:<14} {seconds:8.1f} s", style=style, markup=False, highlight=False)


class LoggedProgress(StageProgress):
    """What `shown` shows, and the same in lines with their time at the end of a file.

    Raises UsageError where the file cannot be written.
    """

    def __init__(self, shown: StageProgress, path: Path) -> None:
        super().__init__()
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"--log-file {path}: cannot be written ({error.strerror}): name another"
            ) from error
        self._all = (shown, LineProgress(self._file, every=OFTEN, starts=True, dated=True))

    def __enter__(self) -> StageProgress:
        self._all[0].__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._all[0].__exit__(kind, error, trace)
        if error is not None:
            self._file.write(f"stopped: {type(error).__name__}: {error}\n")
        self._file.flush()

    def __call__(self, stage: str, done: int, total: int) -> None:
        for one in self._all:
            one(stage, done, total)

    def note(self, text: str) -> None:
        super().note(text)
        for one in self._all:
            one.note(text)

    def _open(self, name: str) -> None:
        for one in self._all:
            one._open(name)

    def _close(self, name: str, seconds: float, finished: bool) -> None:
        for one in self._all:
            one._close(name, seconds, finished)


class BarProgress(TerminalProgress):
    """The live bar alone, for a run that is one of many and leaves one line of its own."""

    def note(self, text: str) -> None:
        StageProgress.note(self, text)

    def _close(self, name: str, seconds: float, finished: bool) -> None:
        self._bar.update(self._task, visible=False)


def bar_on(stream: TextIO | None = None) -> StageProgress:
    """What `stream` (standard error by default) shows of one run of many: a live bar in a terminal, else nothing."""
    console = Console(file=stream or sys.stderr)
    return BarProgress(console) if console.is_terminal else StageProgress()


def progress_on(stream: TextIO | None = None) -> StageProgress:
    """Progress for `stream` (standard error by default): live in a terminal, lines elsewhere; as the options of the
    command at work ask for it."""
    chosen, context = stream or sys.stderr, click.get_current_context(silent=True)
    asked = context.meta if context is not None else {}
    console = Console(file=chosen)
    if asked.get(QUIET):
        shown = StageProgress()
    elif asked.get(VERBOSE):
        shown = LineProgress(chosen, every=OFTEN, starts=True)
    else:
        shown = TerminalProgress(console) if console.is_terminal else LineProgress(chosen)
    path = asked.get(LOG_FILE)
    return shown if path is None else LoggedProgress(shown, Path(path))
