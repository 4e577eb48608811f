"""What the user sees: progress, logs and warnings on stderr, results on stdout.

On a terminal progress is drawn with bars; anywhere else (files, CI, pipes) it is plain lines, a few a minute.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.progress import Task as BarTask
from rich.text import Text

from flashvaed_cli.cli.streams import send_nowhere
from flashvaed_cli.printable import printable_line, printable_message
from flashvaed_cli.progress import Progress, Task

PLAIN_WIDTH = 120
PLAIN_INTERVAL_S = 5.0
LONGEST_MESSAGE = 2000
_TIMES_WIDTH = 2 * len("0:00:00") + 5  # elapsed and left, and the gaps between six columns


class _LastingConsole(Console):
    """A console that keeps working when nobody reads it any more (`| head -1`, a `tee` that died)."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        send_nowhere(sys.stderr if self.stderr else sys.stdout)


def result_console(*, on_stderr: bool = False) -> Console:
    """For results. Without a terminal, tables keep a fixed width, so that logs do not depend on one."""
    stream = sys.stderr if on_stderr else sys.stdout
    return _LastingConsole(stderr=on_stderr, width=None if stream.isatty() else PLAIN_WIDTH)


def stderr_console() -> Console:
    """For everything that is not the result."""
    return _LastingConsole(stderr=True, soft_wrap=True)


def print_error(message: str) -> None:
    """One red message."""
    stderr_console().print(Text(f"Error: {printable_message(message, LONGEST_MESSAGE)}", style="bold red"))


def print_step(message: str) -> None:
    """One line between the steps of a recipe."""
    stderr_console().print(Text(printable_line(message), style="bold"))


@contextmanager
def open_progress(*, quiet: bool) -> Iterator[Progress]:
    """The kind of progress that suits where stderr goes; bars are cleared at the end."""
    console = stderr_console()
    if quiet:
        yield QuietProgress(console)
    elif console.is_terminal:
        with RichProgress(console) as progress:
            yield progress
    else:
        yield PlainProgress(console)


class QuietProgress:
    """Warnings only."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def task(self, description: str, total: int | None = None) -> AbstractContextManager[Task]:
        return _quiet_task()

    def log(self, message: str) -> None:
        pass

    def warn(self, message: str) -> None:
        _print_warning(self._console, message)


class PlainProgress:
    """Lines: one when a task starts, one when it ends, and in between at most one every `interval_s`."""

    def __init__(self, console: Console, *, interval_s: float = PLAIN_INTERVAL_S) -> None:
        self._console = console
        self._interval_s = interval_s

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        task = _PlainTask(self, description, total, self._interval_s)
        yield task
        task.finish()

    def log(self, message: str) -> None:
        self._console.print(Text(printable_message(message, LONGEST_MESSAGE)))

    def warn(self, message: str) -> None:
        _print_warning(self._console, message)


class RichProgress:
    """Bars; logs and warnings appear above them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=_bar_width(console)),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            _InfoColumn(console),
            console=console,
            transient=True,
        )

    def __enter__(self) -> RichProgress:
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        shown = printable_line(description, self._console.width // 3)
        task_id = self._bars.add_task(shown, total=total, info={})
        try:
            yield _RichTask(self._bars, task_id)
        finally:
            self._bars.remove_task(task_id)

    def log(self, message: str) -> None:
        self._console.print(Text(printable_message(message, LONGEST_MESSAGE)))

    def warn(self, message: str) -> None:
        _print_warning(self._console, message)


def _bar_width(console: Console) -> int:
    return 24 if console.width >= PLAIN_WIDTH else 12


class _InfoColumn(ProgressColumn):
    """As many of the figures as the terminal has room for: the last are dropped first; step and times stay whole."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: BarTask) -> Text:
        counted = len(f"{task.completed:.0f}") + len(f"{task.total or 0:.0f}") + 1
        left = self._console.width - len(task.description) - _bar_width(self._console) - counted - _TIMES_WIDTH
        info = dict(task.fields["info"])
        while info and len(shown := printable_line(format_info(info))) > left:
            info.popitem()
        return Text(shown if info else "", no_wrap=True)


class _QuietTask:
    def advance(self, count: int = 1, **info: object) -> None:
        pass


class _RichTask:
    def __init__(self, bars: Bars, task_id: TaskID) -> None:
        self._bars = bars
        self._task_id = task_id

    def advance(self, count: int = 1, **info: object) -> None:
        self._bars.advance(self._task_id, count)
        if info:
            self._bars.update(self._task_id, info=info)


class _PlainTask:
    def __init__(self, progress: PlainProgress, description: str, total: int | None, interval_s: float) -> None:
        self._progress = progress
        self._description = description
        self._total = total
        self._interval_s = interval_s
        self._done = 0
        self._info = ""
        self._first: tuple[int, float] | None = None
        self._started_s = self._printed_s = time.monotonic()
        progress.log(f"{description} ..." if total is None else f"{description}: {total} to do")

    def advance(self, count: int = 1, **info: object) -> None:
        self._done += count
        self._info = format_info(info) or self._info
        now_s = time.monotonic()
        if now_s - self._printed_s >= self._interval_s:
            self._printed_s = now_s
            self._progress.log(f"{self._line()}{self._left(now_s)}")

    def finish(self) -> None:
        self._progress.log(f"{self._line()} in {time.monotonic() - self._started_s:.1f} s")

    def _left(self, now_s: float) -> str:
        """At the rate since the first report, so that what an interrupted run had already done does not count."""
        if self._first is None:
            self._first = (self._done, now_s)
        done, since_s = self._done - self._first[0], now_s - self._first[1]
        if self._total is None or done <= 0:
            return ""
        left_s = round((self._total - self._done) * since_s / done)
        return f", {timedelta(seconds=left_s)} left"

    def _line(self) -> str:
        of_total = "" if self._total is None else f"/{self._total}"
        return f"{self._description}: {self._done}{of_total} {self._info}".rstrip()


@contextmanager
def _quiet_task() -> Iterator[Task]:
    yield _QuietTask()


def format_info(info: Mapping[str, object]) -> str:
    """`loss=0.1235 step=3`: floats with four significant digits."""
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in info.items()
    )


def _print_warning(console: Console, message: str) -> None:
    console.print(Text(f"Warning: {printable_message(message, LONGEST_MESSAGE)}", style="yellow"))
