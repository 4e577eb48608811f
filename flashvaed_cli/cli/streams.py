"""Standard streams as users leave them: closed, cut off by `head`, or in an encoding that lacks our characters."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TextIO

from flashvaed_cli.errors import FlashVaedError


def prepare_streams() -> None:
    """Give closed streams somewhere to go before a file takes their descriptor; replace what cannot be printed.

    Help, versions and messages may lose their reader (`| head -1`) like any result: what is left goes nowhere.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 (for the whole run)
        elif isinstance(stream, TextIOWrapper) and mode == "w":
            setattr(sys, name, _LastingStream(stream))


class _LastingStream(TextIOWrapper):
    """A stream that goes on when its reader has left. Its `buffer` still raises BrokenPipeError."""

    def __init__(self, stream: TextIOWrapper) -> None:
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors="replace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or discard."""
        try:
            return super().write(text)
        except BrokenPipeError:
            send_nowhere(self)
            return len(text)

    def flush(self) -> None:
        """Flush, or discard."""
        try:
            super().flush()
        except BrokenPipeError:
            send_nowhere(self)

    def close(self) -> None:
        """Flush: the stream that it stands for owns the descriptor."""
        if not self.buffer.closed:
            self.flush()


def was_closed(stream: TextIO) -> bool:
    """Whether a stream was closed when the program began, so that what is written to it goes nowhere."""
    return getattr(stream, "name", None) == os.devnull


@contextmanager
def reader_may_leave(*, has_written: bool) -> Iterator[None]:
    """Print a result. A reader that has had enough (`| head -1`) is no error: the files are written.

    Args:
        has_written: files hold the result too.
    Raises:
        FlashVaedError: the result cannot be printed for another reason.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        send_nowhere(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            raise FlashVaedError(
                f"{'the files are written, but ' if has_written else ''}the result cannot be printed: "
                f"{error.strerror}. Check where stdout goes."
            ) from error


def send_nowhere(stream: TextIO) -> None:
    """Discard whatever is still written to a stream: nobody reads it, and Python would complain on exit."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
