"""The most the machine can do: how fast it multiplies matrices, how fast it moves memory.

A decoder can be no faster than its operations at one rate and its bytes at the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from flashvaed_cli.decoders.spec.blocks import (
    AttentionSpec,
    BlockSpec,
    CellUpsampleSpec,
    ChainSpec,
    ResBlockSpec,
    ShuffleUpsampleSpec,
    UpsampleSpec,
)
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.naf_blocks import CellHeadSpec, IstaSpec, NafSpec
from flashvaed_cli.metrics.speed import synchronizer

_CPU_COPY_BYTES = 128 * 2**20  # well beyond the caches
_DEVICE_COPY_BYTES = 2**30
_SHORTEST_CALL_S = 0.01
_COMPARED_S = 0.1
_SMALLEST_LAST_SIDE, _LARGEST_SIDE = 512, 8192


@dataclass(frozen=True)
class MachineRates:
    """Measured, not looked up.

    Attributes:
        matmul_gflop_per_s: product of two large square matrices in the given dtype, by torch's matrix product or, if
            that is faster, by a 1x1 convolution: the two come from different libraries.
        copy_gbyte_per_s: bytes read plus bytes written while a large tensor is copied.
    """

    matmul_gflop_per_s: float
    copy_gbyte_per_s: float

    def best(self, other: MachineRates) -> MachineRates:
        """The higher of each rate, because other work on the machine can only lower them."""
        return MachineRates(
            max(self.matmul_gflop_per_s, other.matmul_gflop_per_s), max(self.copy_gbyte_per_s, other.copy_gbyte_per_s)
        )


def measure_rates(device: torch.device | str, dtype: torch.dtype, *, budget_s: float = 0.35) -> MachineRates:
    """Measure both rates, about `budget_s` seconds each; on the CPU with the threads that torch uses now."""
    device = torch.device(device)
    return MachineRates(_matmul_rate(device, dtype, budget_s), _copy_rate(device, budget_s))


def float32_speedup(dtype: torch.dtype) -> float:
    """How many times as fast this processor multiplies float32 matrices as those of another number format."""
    cpu, best = torch.device("cpu"), {torch.float32: 0.0, dtype: 0.0}
    for one in (torch.float32, dtype) * 2:  # in turns, because other work on the machine can only lower a rate
        best[one] = max(best[one], _matmul_rate(cpu, one, _COMPARED_S))
    return best[torch.float32] / best[dtype]


@torch.no_grad()
def _matmul_rate(device: torch.device, dtype: torch.dtype, budget_s: float) -> float:
    """The side grows until a product takes long enough to time; the best rate counts."""
    deadline = time.perf_counter() + budget_s
    best, side = 0.0, 256
    generator = torch.Generator(device).manual_seed(0)
    while True:
        a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
        image, kernel = a[None, None].permute(0, 3, 1, 2), b[:, None, None].permute(0, 3, 1, 2)  # channels innermost
        calls = (partial(torch.matmul, a, b, out=torch.empty_like(a)), partial(F.conv2d, image, kernel))
        elapsed = min(_fastest(call, device, deadline) for call in calls)
        best = max(best, 2 * side**3 / elapsed / 1e9)
        is_long_enough = elapsed > _SHORTEST_CALL_S and side >= _SMALLEST_LAST_SIDE
        if is_long_enough or side == _LARGEST_SIDE or time.perf_counter() > deadline:
            return best
        side *= 2


@torch.no_grad()
def _copy_rate(device: torch.device, budget_s: float) -> float:
    num_bytes = _CPU_COPY_BYTES if device.type == "cpu" else _DEVICE_COPY_BYTES
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.zeros_like(source)
    elapsed = _fastest(lambda: target.copy_(source), device, time.perf_counter() + budget_s)
    return 2 * num_bytes / elapsed / 1e9


def _fastest(call: Callable[[], object], device: torch.device, deadline: float, *, max_calls: int = 8) -> float:
    """Seconds of the fastest call, after a warm-up call; at least one is timed."""
    synchronize = synchronizer(device) or (lambda: None)
    call()
    fastest = float("inf")
    for _ in range(max_calls):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        fastest = min(fastest, time.perf_counter() - start)
        if time.perf_counter() > deadline:
            break
    return fastest


def traffic_elements(spec: DecoderSpec, grid: tuple[int, int, int]) -> int:
    """The fewest elements that a decoder reads and writes, if everything between two layers were fused.

    Every convolution reads its input and writes its output once, a shortcut is read once; norms, activations,
    additions, enlarged frames, windows over the past and the weights do not count. So a real decoder moves more.

    Args:
        grid: latent frames, height, width; batch 1.
    """
    total, entrance = 0, grid
    bypassed = spec.bypassed()
    for address, block in spec.blocks():
        if address.endswith(".0"):
            entrance = grid
        total += _block_traffic(block, grid)
        grid = block.grid_after(grid)
        if address in bypassed:  # read once more; added where the stage's output is written
            total += entrance[0] * entrance[1] * entrance[2] * bypassed[address].blocks[0].in_width
    return total


def _block_traffic(block: BlockSpec, grid: tuple[int, int, int]) -> int:
    positions = grid[0] * grid[1] * grid[2]
    if isinstance(block, AttentionSpec):
        return positions * (3 * block.width + 8 * block.inner_width)  # qkv, their mix and both projections; residual
    if isinstance(block, UpsampleSpec):
        frames, height, width = block.grid_after(grid)
        temporal = 0 if block.temporal is None else block.temporal.in_width + block.temporal.out_width
        spatial = frames * (grid[1] * grid[2] * block.spatial.in_width + height * width * block.spatial.out_width)
        return (grid[0] - 1) * grid[1] * grid[2] * temporal + spatial
    if isinstance(block, ResBlockSpec | ChainSpec):
        layers = [layer for name, layer in block.layers.items() if name != "shortcut"]
        shortcut = block.in_width  # read once more; its output is added where conv2 writes
        return positions * (sum(layer.in_width + layer.out_width for layer in layers) + shortcut)
    if isinstance(block, ShuffleUpsampleSpec | CellUpsampleSpec):  # a residual is added where the layer writes
        return positions * (block.conv.in_width * (2 if block.residual else 1) + block.conv.out_width)
    if isinstance(block, NafSpec | IstaSpec):
        layers = block.layers.items()
        inner = sum(one.width for one in block.inner_tensors.values())
        return positions * (sum((one.in_width + one.out_width) * block.num_uses(name) for name, one in layers) - inner)
    if isinstance(block, CellHeadSpec):
        frames, height, width = block.grid_after(grid)
        return positions * block.in_width + frames * height * width * block.out_width
    return positions * (block.in_width + block.out_width)
