"""Open and read files within limits. Imports no torch."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from flashvaed_cli.errors import TensorFileError
from flashvaed_cli.limits import MAX_JSON_DEPTH, MAX_JSON_VALUES

_KINDS = {stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}


def kind_if_irregular(path: Path) -> str | None:
    """The kind of a path that cannot be read like a file (`a pipe`, `a device`); None for files, folders, nothing."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return None
    return next((name for test, name in _KINDS.items() if test(mode)), None)


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; a pipe or device, which could block forever, is refused at once.

    Raises:
        TensorFileError: a pipe, a socket or a device.
        OSError: as of `open`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        kind = kind_if_irregular(path) or "no regular file"
        raise TensorFileError(f"{path}: {kind}, not a file. Save its content as a file and give that.")
    return file


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        TensorFileError: larger, or not a regular file.
        OSError: as of `open`.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise TensorFileError(f"{path}: {path.stat().st_size} bytes, where at most {limit} are read.")
    return content


@contextmanager
def unchanging(*paths: Path) -> Iterator[None]:
    """Notice that a file was written, replaced or removed while the block read it, from one opening to the next.

    Args:
        paths: files, and folders in place of the files directly in them.
    Raises:
        TensorFileError: one was, whatever the block made of it.
    """
    files = [file for path in paths for file in (path.iterdir() if path.is_dir() else (path,))]
    before = [_stamp(file) for file in files]
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    changed = next((path for path, stamp in zip(files, before, strict=True) if _stamp(path) != stamp), None)
    if changed is not None:
        raise TensorFileError(
            f"{changed} was changed while it was read. Wait until whatever writes it has ended, and run again."
        ) from failure
    if failure is not None:
        raise failure


def _stamp(path: Path) -> tuple[int, int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def parse_json(text: str | bytes) -> Any:
    """JSON text to values.

    Raises:
        ValueError: not JSON, more values than `MAX_JSON_VALUES`, or nested deeper than `MAX_JSON_DEPTH`.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    num_values = text.count(",") + text.count("[") + text.count("{")
    if num_values > MAX_JSON_VALUES:
        raise ValueError(f"more than {MAX_JSON_VALUES} values")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels") from None
    level, depth = [value], 0
    while level := [item for box in level for item in _items(box)]:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")
    return value


def _items(value: object) -> list[object] | tuple[()]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else ()
