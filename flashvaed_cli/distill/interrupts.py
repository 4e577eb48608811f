"""SIGINT, SIGTERM and SIGHUP as a request to stop at the next good moment, not as an exception anywhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class StopWish:
    """Whether a stop was requested; `signal_number` says by which signal."""

    signal_number: int | None = None


@contextmanager
def stop_wish() -> Iterator[StopWish]:
    """Collect signals while the block runs. A second one acts as it would have without the block.

    Outside the main thread, where Python cannot catch signals, no request is ever seen.
    """
    wish = StopWish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}  # nohup

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def on_signal(number: int, _frame: FrameType | None) -> None:
        wish.signal_number = number
        restore()

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield wish
    finally:
        restore()
