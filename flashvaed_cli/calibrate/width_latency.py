"""The latency model of pruning: narrowed decoders with random weights, every block timed in its place.

Only the blocks that pruning reaches (the tail of the decoder) run narrowed, on the activations that the decoder
itself feeds them, with exact operators and channels-last, as in production. Neighbouring stages swap the roles of
stream and inner width, so that one sweep over two ratios covers each residual block's grid of stream by inner width
and each upsampler's grid of the streams before and after it. Whole decoder and narrowed tails are timed in turns, and
only ratios of their times count.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flashvaed_cli.decoders.modules.bands import bands
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.modules.memory_format import channels_last, use_channels_last
from flashvaed_cli.decoders.predict.latency import (
    Axis,
    BlockLatency,
    WidthLatency,
    block_axes,
    coordinate,
    rounded_ladder,
    width_ladder,
)
from flashvaed_cli.decoders.spec.addresses import split_block, stage_of
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.groups import ChannelGroup, channel_groups
from flashvaed_cli.decoders.variants.exact import exact_decoder, exact_spec
from flashvaed_cli.progress import Progress, Task

Narrow = Callable[[DecoderSpec, Mapping[str, int]], DecoderSpec]
"""The spec with the given widths by channel group; see `surgery.respec.spec_of_widths`."""

_LONGEST_BETWEEN = 2.0
"""Narrowed decoders that together take so many times as long as the whole one run between two of its measurements."""
_CLOCK_MS = 1e-6
"""Below the resolution of any clock; times must stay positive."""


@runtime_checkable
class RoundProfiler(Protocol):
    """Median milliseconds of named modules within one call; see `metrics.module_times.profile_modules`."""

    def __call__(
        self, model: nn.Module, call: Callable[[], object], names: list[str], *, num_warmup: int, num_rounds: int
    ) -> dict[str, float]: ...


@dataclass
class _Run:
    """One model to time at one set of widths; `names` are its modules by block address, a bypass with the last."""

    widths: dict[str, int]
    model: nn.Module
    call: Callable[[], object]
    names: dict[str, tuple[str, ...]]
    samples: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def time(self, profile: RoundProfiler, *, num_warmup: int, unit_ms: float | None = None) -> float:
        """Add one sample, in units of `unit_ms` or of its own sum; returns its sum in milliseconds."""
        modules = list(itertools.chain.from_iterable(self.names.values()))
        with bands():  # as a decoding runs
            found = profile(self.model, self.call, modules, num_warmup=num_warmup, num_rounds=1)
        sum_ms = max(sum(found.values()), _CLOCK_MS)
        for address, names in self.names.items():
            self.samples[address].append(sum(found[name] for name in names) / (unit_ms or sum_ms))
        return sum_ms

    def latency(self) -> dict[str, float]:
        """Medians by block, scaled to add up to the median of the sum.

        On a busy machine a short block often runs undisturbed and a long one never, so medians of short ones are low.
        """
        medians = {address: statistics.median(times) for address, times in self.samples.items()}
        total = statistics.median(sum(times) for times in zip(*self.samples.values(), strict=True))
        scale = total / (sum(medians.values()) or 1.0)
        return {address: scale * median for address, median in medians.items()}


@torch.no_grad()
def measure_width_latency(
    decoder: Decoder,
    latents: Float[Tensor, "1 C T Hz Wz"],
    stages: Sequence[str],
    *,
    narrow: Narrow,
    profile: RoundProfiler,
    num_rounds: int,
    budget_s: float,
    progress: Progress,
) -> WidthLatency:
    """Time a decoder over a grid of widths of the channel groups of some stages.

    The grid has all widths of `width_ladder`, or every second one if time is short; each of its
    points is timed at least once, however long that takes.

    Args:
        decoder: left unchanged.
        latents: on the decoder's device, in the number format to measure.
        stages: stages whose widths vary, as pruning would change them.
        narrow: makes the specs to time.
        profile: measures named modules.
        num_rounds: maximum number of rounds over the grid; the median counts.
        budget_s: seconds after which no further round begins.
    Raises:
        ValueError: the stages have no channel group.
    """
    groups = [group for group in channel_groups(decoder.spec) if group.stage in stages]
    if not groups:
        raise ValueError(f"no channel group in {', '.join(stages)}")
    axes = block_axes(decoder.spec, groups)
    started = time.monotonic()
    whole, entering = _whole_run(decoder, channels_last(latents), groups, next(iter(axes)))
    whole_ms = [whole.time(profile, num_warmup=0)]
    tail_s = whole_ms[0] / 1e3 * sum(share for address, (share,) in whole.samples.items() if address in axes)
    left_s = budget_s - (time.monotonic() - started)
    ladders = {group.name: rounded_ladder(width_ladder(group.width), group.run) for group in groups}
    grid = _grid(decoder.spec, groups, ladders)
    if (num_rounds + 1) * _grid_seconds(grid, groups, tail_s) > left_s:
        ladders = {name: _every_second(ladder) for name, ladder in ladders.items()}
        grid = _grid(decoder.spec, groups, ladders)
    num_warmup = int(2 * _grid_seconds(grid, groups, tail_s) <= left_s)
    progress.log(f"latency model: {len(grid)} sets of widths of {', '.join(dict.fromkeys(g.stage for g in groups))}")
    tails = [_tail_run(narrow(decoder.spec, widths), widths, list(axes), entering) for widths in grid]
    with progress.task("latency model", num_rounds * len(tails)) as task:
        for round_index in range(num_rounds):
            if round_index > 0 and time.monotonic() - started > budget_s:
                break
            whole_ms += _time_round(whole, tails, profile, num_warmup=0 if round_index else num_warmup, task=task)
    unit_ms = statistics.median(whole_ms)
    times = [
        (run.widths, {a: max(unit_ms * t, _CLOCK_MS) for a, t in run.latency().items()}) for run in (whole, *tails)
    ]
    fixed_ms = sum(ms for address, ms in times[0][1].items() if address not in axes)
    return WidthLatency(fixed_ms, tuple(_table(address, its, times) for address, its in axes.items()), ladders)


def _time_round(
    whole: _Run, tails: Sequence[_Run], profile: RoundProfiler, *, num_warmup: int, task: Task
) -> list[float]:
    """One sample of every tail in units of the whole decoder's time, which is measured again now and then.

    A machine stays busy for seconds to minutes, and slows down equally what runs close together. Returns the whole
    decoder's times in milliseconds.
    """
    whole_ms: list[float] = []
    between_ms = 0.0
    for run in tails:
        if not whole_ms or between_ms >= _LONGEST_BETWEEN * whole_ms[-1]:
            whole_ms.append(whole.time(profile, num_warmup=0))
            between_ms = 0.0
        between_ms += (num_warmup + 1) * run.time(profile, num_warmup=num_warmup, unit_ms=whole_ms[-1])
        task.advance()
    return whole_ms


def _grid(
    spec: DecoderSpec, groups: Sequence[ChannelGroup], ladders: Mapping[str, Sequence[int]]
) -> list[dict[str, int]]:
    """All sets of widths to time except the full one."""
    odd = _odd_groups(spec, groups)
    length = max(len(ladder) for ladder in ladders.values())
    found: list[dict[str, int]] = []
    for i, j in itertools.product(range(length), repeat=2):
        widths = {}
        for group in groups:
            ladder = ladders[group.name]
            widths[group.name] = ladder[min(j if group.name in odd else i, len(ladder) - 1)]
        if widths not in found:
            found.append(widths)
    return found[1:]


def _odd_groups(spec: DecoderSpec, groups: Sequence[ChannelGroup]) -> set[str]:
    """Groups on the second ratio, so that the two axes of every block vary separately: the stream after a non-residual
    block that connects two streams, if the stream before it is on the first; and the inner tensor of a residual block,
    if its stream is on the first."""
    owner = {tensor: group.name for group in groups for tensor in group.tensors}
    odd: set[str] = set()
    known: set[str] = set()
    for (source, _), (address, block) in itertools.pairwise(spec.blocks()):
        before, after = owner.get(source), owner.get(address)
        inner = [owner[tensor] for name in block.inner_tensors if (tensor := f"{address}.{name}") in owner]
        if before and after and after not in known and (before in odd) == bool(block.inner_tensors):
            odd.add(after)
        known |= {name for name in (before, after) if name}
        if inner and (after or before) not in odd:
            odd.update(inner)
    return odd


def _every_second(ladder: Sequence[int]) -> tuple[int, ...]:
    return tuple(width for i, width in enumerate(ladder) if i % 2 == 0 or i == len(ladder) - 1)


def _grid_seconds(grid: Sequence[Mapping[str, int]], groups: Sequence[ChannelGroup], tail_s: float) -> float:
    """Rough time of one round: narrowing saves at most two thirds, because small decoders are not arithmetic-bound."""
    shares = []
    for widths in grid:
        ratios = {group.name: widths[group.name] / group.width for group in groups}
        inner = [ratio for name, ratio in ratios.items() if ".inner" in name]
        stream = [ratio for name, ratio in ratios.items() if ".inner" not in name]
        shares.append(0.33 + 0.67 * (statistics.fmean(inner) if inner else 1.0) * statistics.fmean(stream or [1.0]))
    return tail_s * sum(shares)


def _whole_run(
    decoder: Decoder, latents: Float[Tensor, "1 C T Hz Wz"], groups: Sequence[ChannelGroup], first: str
) -> tuple[_Run, Tensor]:
    """The decoder itself, warm, and the activations that enter the block `first`."""
    model = use_channels_last(exact_decoder(deepcopy(decoder).to(latents.dtype)))
    start = _tail_start(decoder.spec, first)
    entering = output = model.enter(latents)
    for address, after in model.walk(output):
        if address == start:
            entering = output
        output = after
    names = {address: (f"stages.{address}",) for address, _ in model.blocks()}
    _name_bypasses(names, model.spec)
    return _Run({group.name: group.width for group in groups}, model, lambda: model(latents), names), entering


def _tail_start(spec: DecoderSpec, first: str) -> str:
    """Where a run that times the block `first` must begin: it needs the input of the stage's bypass."""
    stage = stage_of(first)
    return first if spec.stage(stage).bypass is None else f"{stage}.0"


def _name_bypasses(names: dict[str, tuple[str, ...]], spec: DecoderSpec) -> None:
    """Count a bypass with the block that it ends with."""
    for address, stage in spec.bypassed().items():
        if address in names:
            names[address] += (f"bypasses.{stage.name}",)


def _tail_run(spec: DecoderSpec, widths: dict[str, int], addresses: Sequence[str], entering: Tensor) -> _Run:
    """All blocks of a narrowed spec, starting with the first that pruning reaches, with random weights."""
    start = _tail_start(spec, addresses[0])
    first_stage, skipped = split_block(start)
    stages = [stage.name for stage in spec.stages]
    remaining = list(spec.stages[stages.index(first_stage) :])
    remaining[0] = remaining[0].model_copy(update={"blocks": remaining[0].blocks[skipped:]})
    tail = Decoder(exact_spec(spec.model_copy(update={"stages": tuple(remaining)}), device_type=entering.device.type))
    use_channels_last(tail.to(entering.device, entering.dtype).eval().requires_grad_(False))

    def in_tail(address: str) -> str:
        stage, index = split_block(address)
        return f"stages.{stage}.{index - (skipped if stage == first_stage else 0)}"

    names = {address: (in_tail(address),) for address in addresses}
    _name_bypasses(names, spec)
    return _Run(widths, tail, lambda: tail(entering), names)


def _table(
    address: str, axes: tuple[Axis, ...], times: Sequence[tuple[Mapping[str, int], Mapping[str, float]]]
) -> BlockLatency:
    """The times of one block; the median if several runs share its coordinates."""
    samples: dict[tuple[float, ...], list[float]] = defaultdict(list)
    for group_widths, latency_ms in times:
        samples[tuple(coordinate(axis, group_widths) for axis in axes)].append(latency_ms[address])
    widths = tuple(tuple(sorted({point[i] for point in samples})) for i in range(len(axes)))
    points = list(itertools.product(*widths))
    if missing := [point for point in points if point not in samples]:
        raise ValueError(f"{address}: {len(missing)} of {len(points)} grid points were not timed: {missing[:3]}")
    return BlockLatency(address, axes, widths, tuple(statistics.median(samples[point]) for point in points))
