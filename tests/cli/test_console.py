"""Progress away from a terminal is plain lines, few of them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from flashvaed_cli.cli.console import PlainProgress, QuietProgress, RichProgress, format_info
from flashvaed_cli.progress import Progress, SilentProgress


def plain_console() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=100), stream


def work(progress: Progress, *, total: int | None = 3) -> None:
    with progress.task("clips", total) as clips, progress.task("steps") as steps:
        for index in range(3):
            steps.advance()
            clips.advance(loss=index / 3, name="a")
    progress.log("done [with] brackets")
    progress.warn("careful")


def test_plain_lines_at_the_ends_only() -> None:
    console, stream = plain_console()
    work(PlainProgress(console, interval_s=1000))
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["clips: 3 to do", "steps ..."]
    assert lines[2].startswith("steps: 3 in 0.")
    assert lines[3].startswith("clips: 3/3 loss=0.6667 name=a in 0.")
    assert lines[4:] == ["done [with] brackets", "Warning: careful"]


def test_plain_lines_after_the_interval() -> None:
    console, stream = plain_console()
    work(PlainProgress(console, interval_s=0))
    assert "clips: 2/3 loss=0.3333 name=a, 0:00:00 left\n" in stream.getvalue()


def test_a_failed_task_is_not_reported_as_done() -> None:
    console, stream = plain_console()
    with pytest.raises(ValueError, match="broken"), PlainProgress(console).task("clips", 3):
        raise ValueError("broken")
    assert stream.getvalue() == "clips: 3 to do\n"


def test_quiet_and_silent() -> None:
    console, stream = plain_console()
    work(QuietProgress(console))
    assert stream.getvalue() == "Warning: careful\n"
    silent = SilentProgress()
    work(silent)
    assert silent.warnings == ["careful"]


def test_bars_draw_and_leave_logs_behind() -> None:
    stream = io.StringIO()
    with RichProgress(Console(file=stream, force_terminal=True, width=100)) as progress:
        work(progress)
        work(progress, total=None)
    assert "done [with] brackets" in stream.getvalue()


def test_info_is_short() -> None:
    assert format_info({"loss": 0.123456, "step": 3}) == "loss=0.1235 step=3"
