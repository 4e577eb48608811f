"""Output folders: refuse to write among files of something else."""

from __future__ import annotations

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
