"""What a user can give as data: videos, stills and latent files, in folders, by pattern or in lists."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from flashvaed_cli.errors import MediaError
from flashvaed_cli.limits import MAX_FILES_SEARCHED
from flashvaed_cli.media.frames.container import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from flashvaed_cli.media.latent_files import LATENT_SUFFIXES
from flashvaed_cli.ownership import is_own_file
from flashvaed_cli.paths import user_path

LIST_SUFFIX = ".txt"
ACCEPTED = (
    f"videos ({' '.join(sorted(VIDEO_SUFFIXES))}), images ({' '.join(sorted(IMAGE_SUFFIXES))}) "
    f"or latents ({' '.join(sorted(LATENT_SUFFIXES))})"
)


def find_clips(inputs: Sequence[str | Path]) -> list[Path]:
    """List the clips that files, folders, glob patterns and lists of these refer to.

    Folders are searched recursively in sorted order, ignoring hidden files and
    flashvaed's own artifacts and caches. A list is a .txt file with one path per line, relative to the list's
    folder; empty lines and lines that start with # are ignored. A missing file named in a list
    is kept: reading it reports it, as for a damaged one. A file reached twice is listed once, at its first place.

    Raises:
        MediaError: an input does not exist, is of no accepted kind, or yields nothing.
    """
    found: dict[Path, None] = {}
    for item in inputs:
        path = user_path(item)
        is_list = path.suffix.lower() == LIST_SUFFIX and path.is_file()
        found.update(dict.fromkeys(_expand_list(path) if is_list else _expand(path)))
    if not found:
        raise MediaError(f"No data was given. Name files, folders, patterns or lists ({LIST_SUFFIX}) of {ACCEPTED}.")
    return list(found)


def _require_searchable(path: Path) -> None:
    """Raise MediaError if a folder or pattern spans more files than any data set has, as `/` and `/**/*.mp4` do."""
    parts = path.parts
    magic = (i for i, part in enumerate(parts) if glob.has_magic(part) and not path.exists())
    first = next(magic, len(parts))
    deepest = None if first == len(parts) or "**" in parts else len(parts) - first
    root = Path(*parts[:first]) if first else Path()
    num_visited = 0
    for folder, folders, files in os.walk(root):
        num_visited += len(folders) + len(files)
        if num_visited > MAX_FILES_SEARCHED:
            raise MediaError(
                f"{path} spans more than {MAX_FILES_SEARCHED} files and folders. Give the folder that holds the clips."
            )
        if deepest is not None and len(Path(folder).parts) - len(root.parts) + 1 >= deepest:
            folders.clear()


def _expand(path: Path) -> list[Path]:
    if path.is_dir() or (glob.has_magic(str(path)) and not path.exists()):
        _require_searchable(path)
    if path.is_dir():
        clips = [p for p in sorted(path.rglob("*")) if _is_clip_in_folder(p, path)]
        if not clips:
            raise MediaError(f"The folder {path} holds no clips. Accepted are {ACCEPTED}.")
        return clips
    if path.exists():
        if not _has_accepted_suffix(path):
            raise MediaError(f"{path} is not of an accepted kind. Accepted are {ACCEPTED}.")
        return [path]
    if not glob.has_magic(str(path)):
        raise MediaError(f"{path} does not exist. Give a file, a folder or a pattern of {ACCEPTED}.")
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 (absolute patterns)
    clips = [p for p in matches if p.is_file() and _has_accepted_suffix(p) and not is_own_file(p)]
    if not clips:
        raise MediaError(f"The pattern {path} matches no clip. Accepted are {ACCEPTED}.")
    return clips


def _expand_list(path: Path) -> list[Path]:
    clips: list[Path] = []
    for number, line in enumerate(_read_lines(path), start=1):
        if not line or line.startswith("#"):
            continue
        entry = path.parent / user_path(line)
        if _has_accepted_suffix(entry) and not entry.exists() and not glob.has_magic(str(entry)):
            clips.append(entry)
            continue
        try:
            clips += _expand(entry)
        except MediaError as error:
            raise MediaError(f"{path}, line {number}: {error}") from error
    if not clips:
        raise MediaError(f"The list {path} names no clips. Write one path per line: {ACCEPTED}.")
    return clips


def _read_lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise MediaError(f"{path} cannot be read as a list of paths ({error}). Save it as UTF-8 text.") from error


def _has_accepted_suffix(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES | LATENT_SUFFIXES


def _is_clip_in_folder(path: Path, folder: Path) -> bool:
    if any(part.startswith(".") for part in path.relative_to(folder).parts):
        return False
    return path.is_file() and _has_accepted_suffix(path) and not is_own_file(path)
