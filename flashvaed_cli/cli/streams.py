"""Standard streams as users leave them: closed, cut off by `head`, or of an encoding that lacks our characters."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper


def prepare_streams() -> None:
    """Give closed streams somewhere to go, before a file gets their number; replace what cannot be printed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 (for the whole run)
        elif isinstance(stream, TextIOWrapper) and mode == "w":
            stream.reconfigure(errors="replace")


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Print a result. A reader that has had enough (`| head -1`) is no error: the files are written."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # or Python would complain when it flushes at its end
        os.close(nowhere)
