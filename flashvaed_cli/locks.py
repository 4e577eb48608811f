"""Keep a second process from doing the same work: kernel file locks, so that none outlives its holder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

from flashvaed_cli.errors import FlashVaedError

_HOLDER = "process"


@contextmanager
def exclusive_lock(path: Path, refusal: Callable[[str], FlashVaedError]) -> Iterator[None]:
    """Lock a small file while the block runs; the file is removed at its end, and the lock ends with the process.

    A killed process leaves the file behind, unlocked. On a file system without locks, nobody is refused.

    Args:
        path: its folders are created.
        refusal: makes the latecomer's error from the name of the holder ("process 7 on box").
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _acquire(path, refusal)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is still locked, so that anyone who has opened it sees that it has been replaced
        file.close()


def _acquire(path: Path, refusal: Callable[[str], FlashVaedError]) -> TextIOWrapper:
    while True:
        file = _open_own(path)
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
            file.write(f"{_HOLDER} {os.getpid()} on {platform.node()}")
            file.flush()
            return file
        file.close()  # its holder removed it between opening and locking


def _open_own(path: Path) -> TextIOWrapper:
    """Open or create a lock file; nothing is written to a file that is not a flashvaed lock.

    Raises:
        FlashVaedError: a link, a folder, a device, or a file with other content has this name.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _not_ours(path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_ours(path)
    file = os.fdopen(descriptor, "a+", encoding="utf-8", errors="replace")
    file.seek(0)
    if file.read(len(_HOLDER)) in ("", _HOLDER):
        return file
    file.close()
    raise _not_ours(path)


def _not_ours(path: Path) -> FlashVaedError:
    return FlashVaedError(
        f"{path} is named like a flashvaed lock file but is something else. Move it away, or choose another place."
    )


def _is_at(path: Path, file: TextIOWrapper) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
