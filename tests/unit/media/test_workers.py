from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flashvaed_cli.errors import MediaError
from flashvaed_cli.media.workers import FileWorkers, default_num_workers


def test_in_process_runs_one_job_at_a_time() -> None:
    done: list[int] = []
    with FileWorkers(0) as workers:
        results = workers.map(lambda job: done.append(job) or -job, [3, 1, 2], str)
        assert next(results) == (3, -3)
        assert done == [3]
        assert list(results) == [(1, -1), (2, -2)]


def test_processes_keep_the_order_and_dead_ones_are_an_error() -> None:
    """One pool for both: a process takes seconds to start."""
    with FileWorkers(1) as workers:
        assert list(workers.map(abs, [-3, 1, -2], str)) == [(-3, 3), (1, 1), (-2, 2)]
        (_, other), *_ = workers.map(_process, [0], str)
        assert other != os.getpid()
        with pytest.raises(ZeroDivisionError):  # a bug keeps its name
            list(workers.map(_fail, [1], str))
        with pytest.raises(MediaError, match=r"process died while it read one of: 7\. .*--num-workers 0"):
            list(workers.map(os._exit, [7], str))


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    """SIGKILL gives the parent no time to end its processes."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal\n"
        "from flashvaed_cli.media.workers import FileWorkers\n"
        "if __name__ == '__main__':\n"
        "    with FileWorkers(1) as workers:\n"
        "        ((_, worker),) = workers.map(eval, ['__import__(\"os\").getpid()'], str)\n"
        "        print(worker, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, str(script)]
    # The worker inherits the pipe: reading it to its end waits until the worker is gone.
    run = subprocess.run(command, check=False, env=environment, stdout=subprocess.PIPE, text=True, timeout=30)
    assert run.returncode == -signal.SIGKILL
    assert int(run.stdout) > 0


def test_few_clips_take_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert [default_num_workers(n) for n in (1, 15, 16, 40, 1000)] == [0, 0, 1, 2, 4]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1), raising=False)
    assert default_num_workers(1000) == 0


def _process(_: int) -> int:
    return os.getpid()


def _fail(job: int) -> float:
    return job / 0
