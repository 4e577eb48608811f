"""Random weights, in alternation: diffusers eager, the original eager and exact, the paper's layout.

Prints tables; nothing is asserted about times. `FLASHVAED_BENCH_SIDE` and `FLASHVAED_BENCH_FRAMES` change the size
of the full-size tables, `FLASHVAED_BENCH_ROUNDS` the number of rounds, `FLASHVAED_BENCH_COMPILE=1` compiles.
"""

from __future__ import annotations

import pytest
import torch

from flashvaed_cli.stages.speed.table import SpeedSettings, TimedSize
from tests.bench.full_size import print_speed, setting

SIDE, FRAMES, ROUNDS = setting("SIDE", 256), setting("FRAMES", 9), setting("ROUNDS", 3)
COMPILE = bool(setting("COMPILE", 0))
FULL_SIZE = "flash (384/24/12)"


pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.mark.bench
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_size(dtype: torch.dtype) -> None:
    settings = SpeedSettings(dtype=dtype, num_rounds=ROUNDS, compile=COMPILE)
    table = print_speed(96, FULL_SIZE, TimedSize(FRAMES, SIDE, SIDE), settings, label="Wan 2.1, full size")
    assert [row.failure for row in table.rows] == [None] * len(table.rows)


@pytest.mark.bench
def test_tiny_wan() -> None:
    settings = SpeedSettings(num_rounds=max(ROUNDS, 5), compile=COMPILE)
    table = print_speed(16, "paper's layout", TimedSize(17, 256, 256), settings, label="builtin:tiny-wan's widths")
    assert [row.failure for row in table.rows] == [None] * len(table.rows)


@pytest.mark.gpu
@pytest.mark.bench
@pytest.mark.skipif(not torch.cuda.is_available(), reason="not measured: needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_full_size_on_a_gpu(dtype: torch.dtype, compiled: bool) -> None:
    settings = SpeedSettings(dtype=dtype, num_rounds=ROUNDS, compile=compiled)
    size = TimedSize(setting("GPU_FRAMES", 81), 480, 832)
    table = print_speed(96, FULL_SIZE, size, settings, label="Wan 2.1, full size", device="cuda")
    assert [row.failure for row in table.rows] == [None] * len(table.rows)
