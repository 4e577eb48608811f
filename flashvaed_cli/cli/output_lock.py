"""One run at a time for an output: a second one is told who is writing it, instead of both finishing in turn."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from flashvaed_cli.errors import FlashVaedError
from flashvaed_cli.locks import exclusive_lock
from flashvaed_cli.paths import user_path

_LONGEST_NAME_BYTES = 200


@contextmanager
def only_run(output: str | None) -> Iterator[None]:
    """Lock an output while the block runs, by a hidden file beside it. None locks nothing.

    Where the folder cannot be written to, nothing is locked: the stage says so better.

    Raises:
        FlashVaedError: another process is writing it.
    """
    with ExitStack() as stack:
        if output is not None:
            place = lock_path(user_path(output))
            with suppress(OSError):
                stack.enter_context(exclusive_lock(place, lambda holder: _taken(output, holder)))
        yield


def lock_path(output: Path) -> Path:
    """Where the lock of an output is: in the nearest folder that exists, with its links followed."""
    target = Path(os.path.realpath(output))
    folder = next(parent for parent in (*target.parents, target) if parent.is_dir())
    name = "-".join(target.relative_to(folder).parts) or "root"
    short = name.encode("utf-8", "surrogateescape")[-_LONGEST_NAME_BYTES:].decode("utf-8", "ignore")
    return folder / f".{short}.lock"


def _taken(output: str, holder: str) -> FlashVaedError:
    return FlashVaedError(
        f"another run is writing {output} ({holder}): wait until it has ended, or give this one another --output."
    )
