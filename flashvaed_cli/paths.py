"""Paths as a user types them, and where a user's caches are."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from flashvaed_cli.errors import FlashVaedError

_LONGEST_NAME_BYTES = 255


def user_path(text: str | Path) -> Path:
    """The path that a text names, with `~` expanded.

    Raises:
        FlashVaedError: the user after the `~` is unknown, or a name in it is too long for a file system.
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        user = str(text).partition("/")[0]
        raise FlashVaedError(f"{text}: there is no home folder {user} here. Write out the path.") from None
    for part in path.parts:
        if len(part.encode("utf-8", "surrogateescape")) > _LONGEST_NAME_BYTES:
            raise FlashVaedError(f"{part[:40]}...: a name of {len(part)} characters is too long. Choose a shorter one.")
    return path


def cache_folder() -> Path:
    """Where a user's caches are: `FLASHVAED_CACHE`, or `flashvaed` in `XDG_CACHE_HOME` or `~/.cache`; not made.

    Raises:
        FileNotFoundError: the user wants none (`FLASHVAED_CACHE=off`), or has no home folder.
    """
    chosen = os.environ.get("FLASHVAED_CACHE", "")
    if chosen.strip().lower() == "off":
        raise FileNotFoundError(errno.ENOENT, "FLASHVAED_CACHE is off")
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    place = os.path.expanduser(chosen or f"{folder}/flashvaed")  # noqa: PTH111 (raises RuntimeError)
    if place.startswith("~"):
        raise FileNotFoundError(errno.ENOENT, "there is no home folder, nor XDG_CACHE_HOME")
    return Path(place)
