"""Ctrl-C and SIGTERM: the same message and the same cleaning up, each with its exit code."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from flashvaed_cli.errors import Interrupted


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the program is at that moment: whoever cleans up after Ctrl-C cleans up after it."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` while the block runs; a second one ends the process at once.

    Only where it would have ended the process, and only in the main one of a launch: the others may wait for it inside
    of a library, where no exception reaches them.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or not is_main_process() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def on_sigterm(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def interruption(error: KeyboardInterrupt, outcome: str) -> Interrupted:
    """What the user is told: how it ended, what came of it, and what was noted on the way out."""
    name, number = ("terminated", signal.SIGTERM) if isinstance(error, Terminated) else ("interrupted", signal.SIGINT)
    interrupted = Interrupted("; ".join([f"{name}: {outcome}", *getattr(error, "__notes__", ())]), number)
    interrupted.is_told_elsewhere = not is_main_process()
    return interrupted


def is_main_process() -> bool:
    """What torchrun and `accelerate launch` say; true where there is no launcher."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


class OutputWatch:
    """Whether a file, or the files of a folder, have changed since this was made."""

    def __init__(self, output: str | None) -> None:
        self._output = output
        self._before = self._state()

    def outcome(self) -> str:
        """In words."""
        if self._output is None or self._state() == self._before:
            return f"nothing was written to {self._output or 'the output'}"
        return f"{self._output} was written, but what belongs to it may be missing"

    def _state(self) -> set[tuple[str, int, int]]:
        if self._output is None:
            return set()
        path = Path(self._output)
        files = [entry for entry in path.iterdir() if not entry.name.startswith(".")] if path.is_dir() else [path]
        return {(file.name, status.st_ino, status.st_mtime_ns) for file in files if (status := _status(file))}


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
