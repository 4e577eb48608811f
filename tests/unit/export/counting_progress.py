"""A progress that remembers what was reported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flashvaed_cli.progress import SilentProgress, Task


class CountingProgress(SilentProgress):
    """Keeps what each task is to count to, what it has counted, and what was said meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.totals: dict[str, int | None] = {}
        self.done: dict[str, int] = {}
        self.said: list[object] = []

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        self.totals[description], self.done[description] = total, 0
        yield _Counting(self, description)


class _Counting:
    def __init__(self, progress: CountingProgress, description: str) -> None:
        self._progress, self._description = progress, description

    def advance(self, count: int = 1, **info: object) -> None:
        self._progress.done[self._description] += count
        self._progress.said += info.values()
