"""Output folders: refuse to write among files of something else, and fill them when all is there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flashvaed_cli.errors import FlashVaedError


def refuse_foreign_folder(folder: Path, *markers: str, force: bool) -> None:
    """Accept a folder that is absent, empty or of an earlier run, which left one of its `markers` there.

    Raises:
        FlashVaedError: a file is in the way; or anything else, without `force`.
    """
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise FlashVaedError(f"{path} is a file; give a folder with --output")
    if force or not folder.exists() or any((folder / marker).exists() for marker in markers):
        return
    if any(not path.name.startswith(".") for path in folder.iterdir()):
        raise FlashVaedError(f"{folder} holds other files: give another folder with --output, or --force")


@contextmanager
def filled_at_the_end(folder: Path, marker: str) -> Iterator[Path]:
    """Yield an empty folder in a hidden sibling of `folder`; when the block ends well, its files go into `folder`.

    A new `folder` appears with all of its files at once. In one that is there, files of the same name are replaced
    one by one and others stay; `marker`, by which `refuse_foreign_folder` knows the folder again, goes first where it
    is new, and else last: the folder is this program's own at every moment. When the block raises, `folder` stays as
    it was; a killed process can leave the sibling behind.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    sibling = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    draft = sibling / "files"  # a folder given as "." has no name
    try:
        draft.mkdir()  # with the rights that a new folder gets here: the sibling is its owner's alone
        yield draft
        if not folder.exists():
            draft.rename(folder)
            return
        files = sorted((path for path in draft.rglob("*") if path.is_file()), key=lambda path: path == draft / marker)
        for file in files if (folder / marker).exists() else reversed(files):
            target = folder / file.relative_to(draft)
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
    finally:
        shutil.rmtree(sibling, ignore_errors=True)


def moved(paths: tuple[Path, ...], folder: Path) -> tuple[Path, ...]:
    """Where files of a draft are once its folder is filled."""
    return tuple(folder / path.name for path in paths)
