"""A fault of each kind, each command among them; `make faults` tries a thousand."""

from __future__ import annotations

import shutil
import sys

import pytest

from tests.faults.__main__ import start

NUM_CASES = 9

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="calls are made to fail by LD_PRELOAD, which Linux has"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="the library that makes calls fail needs a C compiler, cc"),
]


def test_nothing_is_lost_where_calls_fail() -> None:
    done = start(["--cases", str(NUM_CASES), "--seed", "5"])
    assert done.returncode == 0, done.stdout
    assert f"{NUM_CASES} faults" in done.stdout and "0 findings" in done.stdout
