"""What the program settles for torch's threads before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashvaed_cli.cli.threads import cpu_quota, num_busy, prepare_threads

NO_FILE = Path("/nowhere")


def test_spinning_is_bounded_unless_the_user_decides(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    prepare_threads(environment, 8, cgroups=tmp_path, load=NO_FILE)
    assert environment == {"GOMP_SPINCOUNT": "10000"}
    for chosen in ({"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "active"}):
        environment = dict(chosen)
        prepare_threads(environment, 8, cgroups=tmp_path, load=NO_FILE)
        assert environment == chosen


@pytest.mark.parametrize(
    ("files", "cores", "threads"),
    [
        ({"cpu.max": "150000 100000"}, 8, "2"),
        ({"cpu.max": "50000 100000"}, 8, "1"),
        ({"cpu.max": "max 100000"}, 8, None),
        ({"cpu.max": "400000 100000"}, 2, None),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 8, "3"),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8, None),
        ({"cpu.max": "nonsense"}, 8, None),
    ],
)
def test_threads_follow_the_quota(tmp_path: Path, files: dict[str, str], cores: int, threads: str | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    environment = {"OMP_WAIT_POLICY": "passive"}
    prepare_threads(environment, cores, cgroups=tmp_path, load=NO_FILE)
    assert environment.get("OMP_NUM_THREADS") == threads
    environment["OMP_NUM_THREADS"] = "7"
    prepare_threads(environment, cores, cgroups=tmp_path, load=NO_FILE)
    assert environment["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("running", "cores", "machine_cores", "threads"),
    [
        ("1", 2, 2, None),  # this process alone
        ("2", 2, 2, "1"),
        ("9", 2, 2, "1"),
        ("4", 8, 8, "5"),
        ("40", 8, 8, "4"),  # half of them in any case
        ("40", 8, 64, None),  # the others have cores of their own
        ("60", 8, 64, "5"),
        ("nonsense", 8, 8, None),
    ],
)
def test_threads_leave_busy_cores_alone(
    tmp_path: Path, running: str, cores: int, machine_cores: int, threads: str | None
) -> None:
    load = tmp_path / "loadavg"
    load.write_text(f"4.53 3.77 2.93 {running}/99 21492\n")
    environment = {"OMP_WAIT_POLICY": "passive"}
    prepare_threads(environment, cores, command="eval", machine_cores=machine_cores, cgroups=tmp_path, load=load)
    assert environment.get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize("command", ["prune", "convert-ops", "distill", "analyze", "export", "run", "--help", ""])
def test_what_writes_weights_does_not_follow_the_load(tmp_path: Path, command: str) -> None:
    """It would write others on a busy machine: sums over another number of threads round otherwise."""
    load = tmp_path / "loadavg"
    load.write_text("4.53 3.77 2.93 9/99 21492\n")
    environment = {"OMP_WAIT_POLICY": "passive"}
    prepare_threads(environment, 8, command=command, cgroups=tmp_path, load=load)
    assert "OMP_NUM_THREADS" not in environment


def test_the_quietest_look_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that runs for a moment while the program starts says nothing about the hour to come."""
    load = tmp_path / "loadavg"
    load.write_text("0 0 0 5/99 1\n")
    monkeypatch.setattr(time, "sleep", lambda _: load.write_text("0 0 0 2/99 1\n"))
    assert num_busy(load) == 1


def test_the_tightest_group_counts(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "cpu.max").write_text("800000 100000")
    (tmp_path / "a" / "cpu.max").write_text("300000 100000")
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000")
    assert cpu_quota(tmp_path, own) == 3
    assert cpu_quota(tmp_path, NO_FILE) == 8


def test_torch_sees_it(tmp_path: Path) -> None:
    script = (
        "import os, runpy, sys\nsys.argv = ['flashvaed', '--version']\n"
        "try:\n    runpy.run_module('flashvaed_cli', run_name='__main__')\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "False 10000"
