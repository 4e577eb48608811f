"""Paths as a user types them."""

from __future__ import annotations

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
