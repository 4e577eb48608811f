"""Threads and load: Wan 2.1 at full size, random weights, 5 frames of 128 x 128, also beside a process that counts.

Every row is a process of its own, with as many threads as it says, alone and beside one busy process, with the spinning
of libgomp's threads bounded as the command line bounds it and as it comes. The decoders take turns; prints medians
of `FLASHVAED_BENCH_ROUNDS` rounds (3). Nothing is asserted about times.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from flashvaed_cli.report.tables import Cell, Column, TableData, to_markdown
from tests.bench.full_size import setting

THREADS = (1, 2, 8)
NAMES = ("eager", "exact", "Flash")
_CHILD = """
import json, sys, torch
from flashvaed_cli.families.wan21.spec import wan_decoder_spec
from flashvaed_cli.metrics.speed import time_alternating
from flashvaed_cli.stages.speed.contestants import own_call, PLAIN_EAGER
from flashvaed_cli.metrics.autotune import Choice
from flashvaed_cli.stages.common.memory_fit import Limits
from tests.bench.full_size import paper_layout, random_decoder
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
whole, narrow = random_decoder(wan_decoder_spec(96), "cpu"), random_decoder(paper_layout(96, 0.125), "cpu")
latents = torch.randn(1, 16, 2, 16, 16)
with torch.no_grad():
    calls = {
        "eager": own_call(whole, latents, PLAIN_EAGER, Limits()),
        "exact": own_call(whole, latents, Choice(), Limits()),
        "Flash": own_call(narrow, latents, Choice(), Limits()),
    }
    found = time_alternating(calls, num_rounds=int(sys.argv[2]))
print(json.dumps({name: result.median for name, result in found.items()}))
"""


@contextmanager
def busy_process() -> Iterator[None]:
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        child.kill()
        child.wait()


def seconds(threads: int, *, is_bounded: bool) -> dict[str, float]:
    """Median seconds by decoder, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "MKL_"))}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    if is_bounded:
        environment["GOMP_SPINCOUNT"] = "10000"  # as `prepare_threads` sets it
    words = [sys.executable, "-c", _CHILD, str(threads), str(setting("ROUNDS", 3))]
    done = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.bench
def test_beside_a_busy_process() -> None:
    rows: list[tuple[Cell, ...]] = []
    for is_bounded in (True, False):
        for threads in THREADS:
            alone = seconds(threads, is_bounded=is_bounded)
            with busy_process():
                beside = seconds(threads, is_bounded=is_bounded)
            figures = [value for found in (alone, beside) for value in (found[name] for name in NAMES)]
            ratios = [found["eager"] / found[name] for found in (alone, beside) for name in NAMES[1:]]
            rows.append(("bounded" if is_bounded else "libgomp's own", threads, *figures, *ratios))
            print(rows[-1], flush=True)
    places = ("alone", "busy")
    columns = [Column("spinning", align="left"), Column("threads", "d")]
    columns += [Column(f"{name}, {place}, s", ".2f") for place in places for name in NAMES]
    columns += [Column(f"{name} × eager, {place}", ".1f") for place in places for name in NAMES[1:]]
    table = TableData(f"{len(os.sched_getaffinity(0))} cores", tuple(columns), tuple(rows))
    Console(width=200).print(to_markdown(table), markup=False, highlight=False)
    assert len(rows) == 2 * len(THREADS)
