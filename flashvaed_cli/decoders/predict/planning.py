"""The fastest way to decode a clip within a memory limit: latent frames per step, tiles, and where they begin.

Time is estimated by arithmetic: the work that the windows' halos repeat, plus a share for each step.
Imports no torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from flashvaed_cli.decoders.predict.cost import Grid, stage_costs
from flashvaed_cli.decoders.predict.lookahead import latents_per_step, widest_window
from flashvaed_cli.decoders.predict.memory import DType, MemoryFormat, MemoryModel
from flashvaed_cli.decoders.predict.tiling import TileLayout, require_tiles, split_addresses, tile_layout
from flashvaed_cli.decoders.spec.addresses import block_of
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.errors import DecodeError, SpecError

STEP_SHARE = 0.1  # cost of a step beside its frames (joining the past to them), in latent frames
CHUNKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # tried beside the whole clip
MAX_TILES = 24  # most tiles tried along the longer side
SPLIT_SLACK = 1.1  # without a limit, a faster split may need this many times the memory of the best one


@dataclass(frozen=True)
class DecodePlan:
    """How a clip is decoded: `chunk` latent frames per step; tiles of `tile` latents from block `split` on.

    For a decoder that sees whole clips, `chunk` is its tile in time, whatever was asked for. `tile` and `split` are
    None for whole frames. `relative_cost` is the estimated time; whole frames in one step take a little over 1.
    """

    chunk: int
    tile: int | None
    split: str | None
    predicted_bytes: int
    relative_cost: float


def choose_plan(
    spec: DecoderSpec,
    grid: Grid,
    *,
    max_memory_bytes: int | None = None,
    dtype: DType = "float32",
    chunk: int | None = None,
    tile: int | None = None,
    channels_last: bool = True,
    has_kernels: bool = True,
    in_bands: bool = False,
    batch: int = 1,
) -> DecodePlan:
    """The plan with the lowest estimated time whose predicted peak is within the limit.

    Args:
        grid: latent frames, height and width of the clip.
        max_memory_bytes: limit of the prediction; None: whole clips and frames, unless `chunk` or `tile` is given.
        chunk: latent frames per step; None: to be chosen.
        tile: side of the tiles in latents; None: to be chosen.
        has_kernels, in_bands: see `memory.MemoryFormat`.
        batch: clips that are decoded together.
    Raises:
        DecodeError: nothing fits; the message names the smallest limit that would do.
        SpecError: `chunk`, `tile` or `max_memory_bytes` is below 1, or the decoder runs on whole frames only.
    """
    if chunk is not None and chunk < 1:
        raise SpecError(f"a chunk holds at least 1 latent frame, not {chunk}")
    if max_memory_bytes is not None and max_memory_bytes < 1:
        raise SpecError(f"a memory limit is at least 1 byte, not {max_memory_bytes}")
    planner = _Planner(spec, grid, MemoryFormat(dtype, channels_last, has_kernels, in_bands), batch)
    layouts = list(_layouts(spec, grid, tile, may_tile=max_memory_bytes is not None))
    if max_memory_bytes is None:
        plans = [planner.plan(chunk or grid[0], layout, tile) for layout, tile in layouts]
        limit = SPLIT_SLACK * min(plan.predicted_bytes for plan in plans)
        return _fastest([plan for plan in plans if plan.predicted_bytes <= limit])
    layouts.sort(key=lambda cut: planner.recomputation(cut[0]))
    found: list[DecodePlan] = []
    best: DecodePlan | None = None
    for layout, side in layouts:
        if best is not None and planner.recomputation(layout) > best.relative_cost:
            break  # no chunk makes up for that
        found.append(planner.largest_chunk(layout, side, chunk, max_memory_bytes))
        if found[-1].predicted_bytes <= max_memory_bytes:
            best = found[-1] if best is None else _fastest([best, found[-1]])
    if best is not None:
        return best
    least = min(found, key=lambda plan: plan.predicted_bytes)
    raise DecodeError(
        _nothing_fits(least, grid, dtype, max_memory_bytes, planner.advice(least), is_clip=spec.sees_whole_clip)
    )


def _fastest(plans: list[DecodePlan]) -> DecodePlan:
    return min(plans, key=lambda plan: (plan.relative_cost, plan.predicted_bytes))


def _nothing_fits(least: DecodePlan, grid: Grid, dtype: str, limit: int, advice: str, *, is_clip: bool) -> str:
    steps = f"clips of {least.chunk} latents are decoded at once" if is_clip else f"chunks of {least.chunk}"
    tiles = "whole frames" if least.tile is None else f"tiles of {least.tile} latents from {least.split} on"
    narrower = "" if dtype in ("float16", "bfloat16") else ", a half-precision dtype"
    return (
        f"{grid[0]} x {grid[1]} x {grid[2]} latents do not decode within {limit / 1e9:.3g} GB in {dtype}: "
        f"the least is {_ceil_gigabytes(least.predicted_bytes)} GB ({steps}, {tiles}). "
        f"Allow that much{narrower}, or {advice}"
    )


def _ceil_gigabytes(num_bytes: int) -> float:
    """In GB with two decimals, rounded up."""
    return -(-num_bytes // 10**7) / 100


def _layouts(
    spec: DecoderSpec, grid: Grid, tile: int | None, *, may_tile: bool
) -> Iterator[tuple[TileLayout | None, int | None]]:
    """Every way to cut frames: whole, with `may_tile` also all sizes of tiles; with `tile` that size only."""
    if tile is not None:
        require_tiles(spec)
    _, height, width = grid
    longer = max(height, width)
    sides = [] if tile is None else [tile]
    if tile is None and may_tile:
        sides = sorted({-(-longer // count) for count in range(2, min(longer, MAX_TILES) + 1)})
    cuts: dict[TileLayout, int] = {}
    for split in split_addresses(spec):
        for side in sides:
            layout = tile_layout(spec, height, width, tile=side, split=split)
            if layout.num_tiles > 1:  # else the halo is as large as the frame
                cuts.setdefault(layout, side)
    if tile is None or not cuts:
        yield None, None
    yield from cuts.items()


class _Planner:
    """Predictions and costs of one clip."""

    def __init__(self, spec: DecoderSpec, grid: Grid, form: MemoryFormat, batch: int) -> None:
        self.spec, self.grid = spec, grid
        self.memory = MemoryModel(spec, grid, form, batch)
        self.flop: dict[str, int] = defaultdict(int)
        for stage in stage_costs(spec, (max(2, grid[0]), *grid[1:])):
            for layer in stage.layers:
                self.flop[block_of(layer.address)] += layer.flop

    def largest_chunk(
        self, layout: TileLayout | None, tile: int | None, chunk: int | None, max_memory_bytes: int
    ) -> DecodePlan:
        """The plan with the largest chunk that fits; if none does, the one that needs the least."""
        if chunk is not None:
            return self.plan(chunk, layout, tile)
        whole = self.plan(self.grid[0], layout, tile)  # keeps no state, so it may need less than smaller chunks
        smallest = self.plan(1, layout, tile)
        least = min(whole, smallest, key=lambda plan: plan.predicted_bytes)
        if whole.predicted_bytes <= max_memory_bytes or least.predicted_bytes > max_memory_bytes:
            return whole if whole.predicted_bytes <= max_memory_bytes else least
        for size in (size for size in reversed(CHUNKS) if 1 < size < self.grid[0]):
            plan = self.plan(size, layout, tile)
            if plan.predicted_bytes <= max_memory_bytes:
                return plan
        return smallest

    def advice(self, least: DecodePlan) -> str:
        """What takes less memory than a plan: sizes left open, if the plan's are given; else less work."""
        layouts = _layouts(self.spec, self.grid, None, may_tile=True)
        freed = min((self.largest_chunk(*cut, None, 1) for cut in layouts), key=lambda plan: plan.predicted_bytes)
        if freed.predicted_bytes < least.predicted_bytes:
            enough = _ceil_gigabytes(freed.predicted_bytes)
            return f"leave the sizes of chunks and tiles open ({enough} GB are enough then)"
        if self.spec.sees_whole_clip and least.chunk > 1:
            return "take a shorter clip length, which gives other frames"
        return "decode fewer or smaller frames"

    def plan(self, chunk: int, layout: TileLayout | None, tile: int | None) -> DecodePlan:
        """The plan with its predicted memory and cost."""
        chunk = latents_per_step(self.spec, self.grid[0], chunk)
        num_bytes = self.memory.predict(chunk, layout)
        split = None if layout is None else layout.split
        overlap = widest_window(self.spec, self.grid[0], chunk) / chunk  # decoded twice where chunks see frames ahead
        cost = self.recomputation(layout) * (overlap + STEP_SHARE / chunk)
        return DecodePlan(chunk, tile, split, num_bytes, cost)

    def recomputation(self, layout: TileLayout | None) -> float:
        """Arithmetic with tiles, as a multiple of that without."""
        if layout is None:
            return 1.0
        rows, columns = layout.window
        covered = layout.num_tiles * rows * columns / (layout.rows[-1].keep_stop * layout.columns[-1].keep_stop)
        addresses = [address for address, _ in self.spec.blocks()]
        tiled = sum(self.flop[address] for address in addresses[addresses.index(layout.split) :])
        total = sum(self.flop.values())
        return 1 + (covered - 1) * tiled / total
