"""Work on files in other processes while this one computes: results in order, a few at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import TypeVar

from flashvaed_cli.errors import MediaError

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")

_MAX_WORKERS = 4
_MIN_CLIPS_PER_WORKER = 16  # a process takes seconds to start; fewer clips are decoded faster than that


def default_num_workers(num_clips: int) -> int:
    """One fewer than the cores that this process may use, at most 4, and none for few clips."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(_MAX_WORKERS, cores - 1, num_clips // _MIN_CLIPS_PER_WORKER))


class FileWorkers:
    """Processes that start with the first job and end with the `with` block; none if `num_workers` is 0.

    They are spawned, not forked: forked ones may hang if threads or CUDA were in use. A worker exits on its own
    when this process is killed. Where the system has no semaphores (no writable /dev/shm), there are none either: the
    work is done here, more slowly.
    """

    def __init__(self, num_workers: int, warn: Callable[[str], object] = warnings.warn) -> None:
        self.num_workers = num_workers
        self._warn = warn
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> FileWorkers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def map(
        self, function: Callable[[JobT], ResultT], jobs: Iterable[JobT], name: Callable[[JobT], str]
    ) -> Iterator[tuple[JobT, ResultT]]:
        """Jobs with their results, in order; only a few run ahead of the consumer, so memory does not grow.

        Args:
            function: picklable (importable by name, or a partial of such a function), as are its arguments and results.
            name: what to call a job if a process dies on it.
        Raises:
            MediaError: a process died.
        """
        if self.num_workers == 0 or not self._started():
            for job in jobs:
                yield job, function(job)
            return
        pending: deque[tuple[JobT, Future[ResultT]]] = deque()
        waiting = iter(jobs)
        try:
            while True:
                while len(pending) <= self.num_workers and (job := next(waiting, None)) is not None:
                    assert self._executor is not None
                    pending.append((job, self._executor.submit(function, job)))
                if not pending:
                    return
                job, future = pending[0]
                result = future.result()
                pending.popleft()
                yield job, result
        except BrokenProcessPool as error:
            files = ", ".join(dict.fromkeys(name(job) for job, _ in pending))
            raise MediaError(
                f"A decoding process died while it read one of: {files}. Either memory ran out (give fewer "
                "--num-workers) or one of them crashes the decoder: run with --num-workers 0, or leave it out."
            ) from error
        finally:
            for _, future in pending:
                future.cancel()

    def _started(self) -> bool:
        """Whether there are processes."""
        try:
            self._executor = self._executor or ProcessPoolExecutor(
                self.num_workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_worker
            )
        except (OSError, ImportError) as error:  # semaphores live in /dev/shm
            self._warn(f"no decoding processes: they need a writable /dev/shm ({error}). Clips are read one by one")
            self.num_workers = 0
        return self._executor is not None


def _begin_worker() -> None:
    # Ctrl-C reaches every process of the terminal; the main one decides, and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, which comes with the first job
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
