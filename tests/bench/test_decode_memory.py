"""Peak memory of the full-size Flash decoder on the CPU: it does not grow with the video, and a limit holds.

Random weights in the paper's layout. Every decode runs in a process of its own; measured is what its resident set
grows by at the peak, from before it decoded, and the weights.
`FLASHVAED_BENCH_MEMORY_FRAMES` (numbers separated by spaces) changes the lengths at 480 x 832.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from flashvaed_cli.report.tables import Cell, Column, TableData, to_rich

LENGTHS = [int(n) for n in os.environ.get("FLASHVAED_BENCH_MEMORY_FRAMES", "17 81").split()]
LIMIT_BYTES = 4 * 10**9

SCRIPT = """
import json, sys, time
from pathlib import Path
import torch
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.variants.exact import exact_decoder
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from tests.bench.full_size import paper_layout

def num_bytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))

num_frames, height, width, chunk, limit = json.loads(sys.argv[1])
torch.manual_seed(0)
decoder = exact_decoder(Decoder(paper_layout(96, 0.125)).eval().requires_grad_(False))
runtime = DecodeRuntime(decoder, DecodeSettings(chunk=chunk, max_memory_bytes=limit))
weights = 4 * decoder.parameter_count
del decoder
latents = torch.randn(1, 16, 1 + (num_frames - 1) // 4, height // 8, width // 8)
plan = runtime.plan(latents)
Path("/proc/self/clear_refs").write_text("5")
before = num_bytes("VmRSS") - weights
start, shown = time.perf_counter(), 0
for frames in runtime.iter_decode(latents):
    shown += frames.shape[2]
seconds = time.perf_counter() - start
assert shown == num_frames
grown = num_bytes("VmHWM") - before
print(json.dumps([plan.chunk, plan.tile, plan.predicted_bytes / 1e9, grown / 1e9, seconds]))
"""


def decode_apart(num_frames: int, height: int, width: int, chunk: int | None, limit: int) -> list:
    """Chunk and tile, predicted and measured GB, seconds."""
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    given = json.dumps([num_frames, height, width, chunk, limit])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, given],
        cwd=Path(__file__).parents[2],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.bench
def test_memory_does_not_grow_with_the_video_and_a_limit_holds() -> None:
    cases: list[tuple[int, int, int, int | None, int]] = [(n, 480, 832, 1, LIMIT_BYTES) for n in LENGTHS]
    cases.append((9, 1088, 1920, None, LIMIT_BYTES))
    rows: list[tuple[Cell, ...]] = []
    measured: list[float] = []
    for num_frames, height, width, chunk, limit in cases:
        used, tile, predicted, grown, seconds = decode_apart(num_frames, height, width, chunk, limit)
        measured.append(grown)
        assert grown <= predicted <= 1.5 * grown and predicted * 1e9 <= limit
        rows.append((f"{num_frames} x {height} x {width}", limit / 1e9, used, tile, predicted, grown, seconds))
        print(rows[-1], flush=True)
    columns = (
        Column("frames", align="left"),
        Column("limit, GB", ".1f"),
        Column("chunk", "d"),
        Column("tile", "d"),
        Column("predicted, GB", ".2f"),
        Column("measured, GB", ".2f"),
        Column("s", ".1f"),
    )
    Console(width=120).print(to_rich(TableData("Full-size Flash (384/24/12), float32, CPU", columns, tuple(rows))))
    assert max(measured[: len(LENGTHS)]) < 1.1 * min(measured[: len(LENGTHS)])
