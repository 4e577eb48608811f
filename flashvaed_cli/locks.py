"""Keep a second process from doing the same work at once: the kernel's file locks, so that none outlives its holder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

from flashvaed_cli.errors import FlashVaedError


@contextmanager
def exclusive_lock(path: Path, refusal: Callable[[str], FlashVaedError]) -> Iterator[None]:
    """Hold the lock of a small file while the block runs; the file goes away with it, and the lock with the process.

    A killed process leaves the file behind, which locks nothing. On a file system without locks nobody is refused.

    Args:
        path: folders are made.
        refusal: makes the error of who comes second from who came first ("process 7 on box").
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _acquire(path, refusal)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is still locked: who has opened it already sees that it is another file
        file.close()


def _acquire(path: Path, refusal: Callable[[str], FlashVaedError]) -> TextIOWrapper:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                file.seek(0)
                holder = file.read()
            raise refusal(holder or "another process") from error
        except OSError:
            return file  # no locks here
        if _is_at(path, file):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            return file
        file.close()  # its holder removed it between opening and locking


def _is_at(path: Path, file: TextIOWrapper) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
