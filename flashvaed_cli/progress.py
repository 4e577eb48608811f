"""Progress reporting, independent of how it is shown.

Every room takes a `Progress`; the command line passes one that draws bars or prints lines.
The protocols can be checked at run time because the tests check every annotation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable


@runtime_checkable
class Task(Protocol):
    """A piece of work with a count."""

    def advance(self, count: int = 1, **info: object) -> None:
        """Count `count` more units done; `info` is shown beside the bar (`loss=0.12`)."""
        ...


@runtime_checkable
class Progress(Protocol):
    """Where long-running work reports to."""

    def task(self, description: str, total: int | None = None) -> AbstractContextManager[Task]:
        """A task that lasts as long as its `with` block; tasks may nest. `total=None`: length unknown."""
        ...

    def log(self, message: str) -> None:
        """Report something worth knowing. Silenced by `--quiet`."""
        ...

    def warn(self, message: str) -> None:
        """Report something that changes what the result means (a skipped clip, a missing metric). Never silenced."""
        ...


class _SilentTask:
    def advance(self, count: int = 1, **info: object) -> None:
        pass


class SilentProgress:
    """Discards everything but warnings, which it keeps in `warnings`. For tests and use as a library."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        yield _SilentTask()

    def log(self, message: str) -> None:
        pass

    def warn(self, message: str) -> None:
        self.warnings.append(message)
