"""Write files whole or not at all: to a sibling, fsync, rename. SIGKILL leaves the old file or the new one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `target` (same suffix); when the block ends well it becomes `target`.

    Parent folders are made. When the block raises, the sibling is removed and `target` stays as it was.
    A killed process can leave a hidden `.NAME.*` sibling behind, never a half-written `target`.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}.", suffix=target.suffix)
    os.close(handle)
    sibling = Path(name)
    try:
        yield sibling
        with sibling.open("rb+") as file:
            os.fsync(file.fileno())
        sibling.chmod(0o666 & ~_umask())
        sibling.replace(target)
        _sync_folder(target.parent)
    except BaseException:
        sibling.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems refuse to sync folders
    finally:
        os.close(descriptor)
