"""Ctrl-C, SIGTERM and SIGHUP: the same message and the same cleaning up, each with its exit code."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from flashvaed_cli.errors import Interrupted

_ENDING = (signal.SIGTERM, signal.SIGHUP)
_NAMES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "the terminal was closed"}


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, raised where the program is at that moment: what cleans up after Ctrl-C cleans up after it."""

    def __init__(self, number: signal.Signals = signal.SIGTERM) -> None:
        super().__init__()
        self.number = number


@contextmanager
def signals_raise() -> Iterator[list[signal.Signals]]:
    """Let SIGTERM and SIGHUP raise `Terminated` while the block runs; a second one ends the process at once.

    Only where they would have ended the process (under nohup SIGHUP does not), and only in the main one of a launch:
    the others may wait for it inside of a library, where no exception reaches them.

    Yields the signals received so far, Ctrl-C included: a library may make another error of what was raised in it.
    """
    received: list[signal.Signals] = []
    caught = dict.fromkeys(_ENDING, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    caught = {number: handler for number, handler in caught.items() if signal.getsignal(number) is handler}
    if threading.current_thread() is not threading.main_thread() or not is_main_process():
        yield received
        return

    def on_signal(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        signal.signal(number, caught[received[-1]])
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(received[-1])

    for number in caught:
        signal.signal(number, on_signal)
    try:
        yield received
    finally:
        for number, handler in caught.items():
            signal.signal(number, handler)


def interruption(error: KeyboardInterrupt, outcome: str) -> Interrupted:
    """What the user is told: how it ended, what is left of it, and what was noted on the way out."""
    number = error.number if isinstance(error, Terminated) else signal.SIGINT
    name = _NAMES[number]
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
