"""Write files and folders atomically: write a hidden sibling, fsync, rename.

SIGKILL leaves the old file or the new one, and perhaps the sibling. Siblings are locked while their writer lives, so
that the next run on the same output can tell which ones are left over and remove them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flashvaed_cli.errors import FlashVaedError

_PARTIAL = ".partial-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RUST_OS_ERROR = re.compile(r"(?:\(os error |\bOs \{ code: )(\d+)")  # safetensors from 0.5 on, and before
_LONGEST_STEM_BYTES = 150  # a name has 255 bytes, and the sibling's is longer


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `target` (same suffix); when the block ends well it becomes `target`.

    Parent folders are created. Links are followed: the target is replaced, and the link stays. When the block
    raises, the sibling is removed and `target` stays as it was. A killed process can leave the sibling behind, never a
    half-written `target`; the next run that writes `target` removes it.

    Raises:
        OSError: the disk refuses, however a library words it.
    """
    target = real_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)

    def make() -> Path:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=_prefix(target), suffix=target.suffix)
        os.close(handle)
        return Path(name)

    with _locked(make) as sibling, _disk_speaks(target):
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


@contextmanager
def draft_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder inside a hidden sibling of `folder`; the sibling goes away when the block ends.

    The draft has a new folder's usual permissions, and so have the files in it when the block ends well.

    Raises:
        OSError: the disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)

    def make() -> Path:
        return Path(tempfile.mkdtemp(dir=folder.parent, prefix=_prefix(folder)))

    with _locked(make) as sibling, _disk_speaks(folder):
        try:
            # The sibling itself is private to its owner, and a folder given as "." has no name.
            draft = sibling / "files"
            draft.mkdir()
            yield draft
        finally:
            shutil.rmtree(sibling, ignore_errors=True)


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """Yield an empty folder under TMPDIR, and remove it at the end; folders left by killed runs are removed first.

    Raises:
        FlashVaedError: TMPDIR is full or cannot be written to.
    """
    try:
        place = Path(tempfile.gettempdir())
    except FileNotFoundError:
        raise FlashVaedError("no folder for temporary files is writable. Set TMPDIR to one that is.") from None
    prefix = f"flashvaed-{purpose}-"
    _remove_dead(place.glob(f"{prefix}*"))
    try:
        with _locked(lambda: Path(tempfile.mkdtemp(prefix=prefix))) as folder:
            try:
                with _disk_speaks(folder):
                    yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        if not str(error.filename).startswith(str(place / prefix)) or error.errno not in _FULL:
            raise
        raise FlashVaedError(
            f"cannot write to {place}: {error.strerror}. Free space there, or set TMPDIR to a folder with more."
        ) from error


def remove_leftovers(target: Path) -> None:
    """Remove siblings of a file or folder left by killed runs; those of a running one stay."""
    target = real_target(target)
    with contextlib.suppress(OSError):
        _remove_dead(path for path in target.parent.iterdir() if path.name.startswith(_prefix(target)))


def real_target(target: Path) -> Path:
    """Where a file is really written, after following all links."""
    return Path(os.path.realpath(target)) if target.is_symlink() else Path(target)


def open_to_all_allowed(folder: Path) -> None:
    """Give the files of a folder the usual permissions of new files; libraries make some for their owner only."""
    rights = 0o666 & ~_umask()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(rights)


@contextmanager
def _disk_speaks(place: Path) -> Iterator[None]:
    """Raise OSError for `place` if the disk refuses, whatever a library raises (torch: RuntimeError)."""
    try:
        yield
    except FlashVaedError:
        raise
    except Exception as error:
        number = _disk_error(error)
        if number is None or (isinstance(error, OSError) and number not in _FULL):
            raise
        raise OSError(number, os.strerror(number), str(place)) from error


def _disk_error(error: BaseException | None) -> int | None:
    """The errno behind a library's own error, or None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found := _RUST_OS_ERROR.search(str(error)):
            return int(found[1])
        error = error.__cause__ or error.__context__
    return None


def _prefix(target: Path) -> str:
    stem = target.stem.encode("utf-8", "surrogateescape")[:_LONGEST_STEM_BYTES].decode("utf-8", "ignore")
    return f".{stem}{_PARTIAL}"


@contextmanager
def _locked(make: Callable[[], Path]) -> Iterator[Path]:
    """Hold a kernel lock on what `make` has made; on a file system without locks, none."""
    while True:
        path = make()
        descriptor = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists():
            break
        os.close(descriptor)  # another run took it for a leftover between creation and locking
    try:
        yield path
    finally:
        os.close(descriptor)


def _remove_dead(paths: Iterator[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            if path.is_symlink() or path.stat().st_uid != os.geteuid():
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


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
