"""Where a command writes: found to be possible before the work, and never over what is not its own.

Every stage claims its output here before anything else: `claim_file` for an artifact, `claim_folder` for a report or an
export, which `filled_at_the_end` then fills.
"""

from __future__ import annotations

import contextlib
import errno
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flashvaed_cli.artifact.store import sha256_of
from flashvaed_cli.atomic import draft_folder, open_to_all_allowed, real_target, remove_leftovers
from flashvaed_cli.errors import FlashVaedError
from flashvaed_cli.ownership import is_own_file
from flashvaed_cli.paths import user_path

_MARKED = (".png", ".mp4")
"""Files that carry a mark wherever this program writes them."""


def claim_file(
    output: str | Path, *, force: bool, reads: Iterable[str | None] = (), beside: Iterable[Path] = ()
) -> Path:
    """The place of a file to write, with what killed runs have left there removed.

    Args:
        force: also replace the command's own input, and files of other programs.
        reads: what the command reads; None and what is no file are passed over.
        beside: other files that the command will write, and folders whose files it will replace.
    Raises:
        FlashVaedError: a folder or device is in the way, the place cannot be written to, or what is there is an input
            or of another program and `force` is not set.
    """
    path = user_path(output)
    if path.is_dir():
        raise FlashVaedError(f"{path} is a folder; give the name of a file with --output.")
    if not force and any(_is_same(path, place) for place in reads):
        raise FlashVaedError(f"{path} is the input itself. Choose another --output, or replace it with --force.")
    beside = tuple(beside)
    for place in (path, *beside):
        _refuse_foreign_file(place, force=force)
    _require_writable(real_target(path).parent)
    for place in (path, *beside):
        remove_leftovers(place)
    return path


def require_apart(path: Path, reads: Iterable[str | None], *, flag: str) -> None:
    """Raise FlashVaedError if a side output is something that the command reads."""
    if any(_is_same(path, place) for place in reads):
        raise FlashVaedError(f"{path} is read by this command, and {flag} would replace it. Give another name.")


def claim_folder(output: str | Path, *markers: str, force: bool) -> Path:
    """The place of a folder to fill: absent, empty or of an earlier run, which left one of its `markers` there.

    Raises:
        FlashVaedError: a file or a link is in the way, the place cannot be written to, or the folder holds anything
            else and `force` is not set.
    """
    folder = user_path(output)
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise FlashVaedError(f"{path} is a file; give a folder with --output")
    _require_writable(folder)
    remove_leftovers(folder)
    if not folder.exists():
        return folder
    if linked := next((path for path in folder.iterdir() if path.is_symlink() and path.is_dir()), None):
        raise FlashVaedError(f"{linked} is a link to another folder, which would be written to: remove it first")
    if force or any(is_own_file(folder / marker) for marker in markers):
        return folder
    if any(not path.name.startswith(".") for path in folder.iterdir()):
        raise FlashVaedError(f"{folder} holds other files: give another folder with --output, or --force")
    return folder


@contextmanager
def filled_at_the_end(
    folder: Path, marker: str, reads: Sequence[str | Path | None] = (), *, force: bool = False
) -> Iterator[Path]:
    """Yield an empty folder in a hidden sibling of `folder`; when the block ends well, its files go into `folder`.

    A new `folder` appears with all of its files at once. In one that is there, files of the same name are replaced
    one by one and others stay; `marker`, by which `claim_folder` knows the folder again, goes first where it
    is new, and else last: the folder is this program's own at every moment. When the block raises, `folder` stays as
    it was; a killed process can leave the sibling behind, which the next one removes.

    Raises:
        FlashVaedError: a file would take the place of one of `reads`, or of one that this program did not write and
            `force` is not set; or the folder's parent has vanished.
    """
    with draft_folder(folder) as draft:
        try:
            yield draft
            open_to_all_allowed(draft)
            _fill(folder, draft, marker, reads, force=force)
        except Exception as error:
            if draft.exists() or folder.exists():
                raise
            raise FlashVaedError(f"{folder.parent} has vanished while {folder} was written. Run again.") from error


def refuse_to_replace(paths: Iterable[Path], reads: Sequence[str | Path | None]) -> None:
    """Raise FlashVaedError if one of the files to write is one of those to read, with or without `--force`."""
    for path in paths:
        if any(_is_same(path, place) for place in reads):
            raise FlashVaedError(f"{path} is read, and would be replaced: give another folder with --output")


def moved(paths: tuple[Path, ...], folder: Path) -> tuple[Path, ...]:
    """Where files of a draft are once its folder is filled."""
    return tuple(folder / path.name for path in paths)


def _fill(folder: Path, draft: Path, marker: str, reads: Sequence[str | Path | None], *, force: bool) -> None:
    if not folder.exists():
        try:
            draft.rename(folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else another run has just made it
                raise
    files = sorted((path for path in draft.rglob("*") if path.is_file()), key=lambda path: path == draft / marker)
    names = [file.relative_to(draft) for file in files]
    refuse_to_replace((folder / name for name in names), reads)
    if not force:
        refuse_foreign_among(folder, names, _recorded_hashes(folder / marker))
    for file in files if (folder / marker).exists() else reversed(files):
        target = folder / file.relative_to(draft)
        target.parent.mkdir(exist_ok=True)
        file.replace(target)


def hashes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, by its place there: a manifest that holds them under `sha256_of_files` lets
    a later run replace these files, and no others of their names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def _recorded_hashes(manifest: Path) -> dict[str, str] | None:
    """What a manifest says of the files beside it; None if it is of a kind or a version that says nothing."""
    if manifest.suffix != ".json" or not is_own_file(manifest):
        return None
    hashes = json.loads(manifest.read_bytes()).get("sha256_of_files")
    return hashes if isinstance(hashes, dict) else None


def refuse_foreign_among(folder: Path, names: Sequence[Path], hashes: dict[str, str] | None = None) -> None:
    """Raise FlashVaedError if a file to replace is not of this program: by its mark, or by the hash of a manifest."""
    for name in names:
        path = folder / name
        if not path.exists() or is_own_file(path):
            continue
        if hashes is None and path.suffix not in _MARKED:
            continue  # nothing tells
        if hashes is not None and hashes.get(name.as_posix()) == sha256_of(path):
            continue
        raise FlashVaedError(
            f"{path} was not written by flashvaed, or was changed since. Give another folder with --output, or replace "
            "it with --force."
        )


def _refuse_foreign_file(path: Path, *, force: bool) -> None:
    if path.is_dir():
        for file in path.iterdir():
            _refuse_foreign_file(file, force=force)
        return
    if path.exists() and not path.is_file():
        raise FlashVaedError(f"{path} is a device, a pipe or a socket; give the name of a file with --output.")
    if not force and path.exists() and not is_own_file(path):
        raise FlashVaedError(
            f"{path} exists and was not written by flashvaed. Choose another name, or replace it with --force."
        )


def _require_writable(folder: Path) -> None:
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise FlashVaedError(f"cannot write to {folder}: {place} is a file, not a folder.")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise FlashVaedError(
            f"cannot write to {folder}: {error.strerror}. Choose another place with --output."
        ) from error


def _is_same(path: Path, place: str | Path | None) -> bool:
    if place is None:
        return False
    with contextlib.suppress(OSError, ValueError):
        return path.samefile(place)
    return False
