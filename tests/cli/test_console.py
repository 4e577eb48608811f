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


@pytest.mark.parametrize("width", [80, 100, 120])
def test_step_total_and_times_stay_whole_and_figures_go_first(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    info = {"loss": 0.1234, "psnr_db": 33.21, "gradient_norm": 0.5123, "learning_rate": 1e-4, "images_per_s": 12.5}
    with RichProgress(console) as progress, progress.task("distill phase 3, a name that is long", 1200) as task:
        task.advance(601, **info)
        (line,) = console.render_lines(progress._bars.get_renderable())[:1]
        shown = "".join(segment.text for segment in line)
    assert "601/1200" in shown and shown.count(":") >= 4 and len(shown.rstrip()) <= width
    assert "…" not in shown
    assert ("loss=0.1234" in shown) or width == 80
    assert "images_per_s" not in shown
