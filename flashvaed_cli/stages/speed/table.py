"""One speed table: time a decoder and its original in several ways, and compute the figures of each row.

Used by `flashvaed eval --speed` and by the benches alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.predict.cost import total_gflop
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.variants.exact import exact_spec, plain_decoder
from flashvaed_cli.errors import DecodeError
from flashvaed_cli.metrics.autotune import Choice
from flashvaed_cli.metrics.contest import Contestant, ContestResult, run_contest
from flashvaed_cli.metrics.roofline import measure_rates, traffic_elements
from flashvaed_cli.metrics.speed import SpeedResult, speed_ratio
from flashvaed_cli.printable import counted
from flashvaed_cli.progress import Progress
from flashvaed_cli.report.evaluation import Spread
from flashvaed_cli.report.speed import SpeedRow, SpeedTable
from flashvaed_cli.stages.common.memory_fit import Limits, fit_to_memory, refusal_at_chunk_one
from flashvaed_cli.stages.speed.contestants import (
    PLAIN_EAGER,
    Latents,
    diffusers_call,
    diffusers_fault,
    own_call,
)
from flashvaed_cli.stages.speed.tuning import tuned_choice

DIFFUSERS, EAGER, EXACT = "diffusers, eager", "original, eager", "original, exact"
RESERVED_NAMES = (DIFFUSERS, EAGER, EXACT)

Grid = tuple[int, int, int]
RowT = TypeVar("RowT", ContestResult, SpeedRow)


@dataclass(frozen=True)
class SpeedSettings:
    """How the decoders of a table are run.

    Attributes:
        chunk: latent frames at a time for our decoders; None decodes at once where that fits into memory.
        tile: side of the tiles in latents; None decodes whole frames where that fits.
        max_memory_bytes: bound for each of our decoders; None: the memory that is free.
        compile: compile the tuned ones.
        autotune: for each tuned decoder, try several ways of running it, or take the remembered one.
    """

    dtype: torch.dtype = torch.float32
    num_rounds: int = 5
    budget_s: float | None = None
    chunk: int | None = None
    tile: int | None = None
    max_memory_bytes: int | None = None
    compile: bool = False
    autotune: bool = False
    seed: int = 0


@dataclass(frozen=True)
class TimedSize:
    """A clip in pixels."""

    num_frames: int
    height: int
    width: int

    def grid(self, spec: DecoderSpec) -> Grid:
        """The smallest latent grid that holds the clip."""
        factor = spec.spatial_factor
        return spec.num_latents(self.num_frames), -(-self.height // factor), -(-self.width // factor)

    def rounded(self, spec: DecoderSpec) -> TimedSize:
        """The size that this grid decodes to: 1 + temporal_factor n frames, sides divisible by spatial_factor."""
        t, h, w = self.grid(spec)
        return TimedSize(spec.num_frames(t), spec.spatial_factor * h, spec.spatial_factor * w)

    def __str__(self) -> str:
        """For titles and messages."""
        return f"{counted(self.num_frames, 'frame')} of {self.width}×{self.height}"


@dataclass(frozen=True)
class _Entry:
    """An unfinished row: its contestant, and the spec that its operations are counted on."""

    contestant: Contestant
    spec: DecoderSpec
    weight_bytes: int
    way: str
    compiled: bool = False


@torch.no_grad()
def time_decoders(
    original: Decoder,
    derived: Mapping[str, Decoder],
    size: TimedSize,
    settings: SpeedSettings,
    device: torch.device,
    *,
    progress: Progress,
    label: str = "",
) -> tuple[SpeedTable, tuple[str, ...]]:
    """Time the original three ways and every derived decoder on one clip of random latents.

    Args:
        original: with whatever operators; the eager rows take the plain ones.
        derived: by name, other than the names of the original's rows.
        label: put before the size in the titles.
    Returns:
        The table, and notes for its reader.
    Raises:
        DecodeError: none of our decoders fits into memory.
    """
    size = size.rounded(original.spec)
    grid = size.grid(original.spec)
    generator = torch.Generator().manual_seed(settings.seed)
    latents = torch.randn(1, original.spec.latent_width, *grid, generator=generator).to(device, settings.dtype)
    notes: list[str] = []
    entries = _baselines(plain_decoder(original), latents, settings, notes)
    for name, decoder in {EXACT: original, **derived}.items():
        entries.append(_tuned_entry(name, plain_decoder(decoder), latents, settings, notes, progress))
    if all(entry.contestant.refusal for entry in entries if entry.contestant.name != DIFFUSERS):
        raise DecodeError(f"{size}: none of our decoders fits into memory: {entries[-1].contestant.refusal}")
    notes += [f"{size}: {e.contestant.name}: {e.contestant.refusal}" for e in entries if e.contestant.refusal]
    contestants = [entry.contestant for entry in entries]
    before = measure_rates(device, settings.dtype)
    results = run_contest(
        contestants, device, num_rounds=settings.num_rounds, budget_s=settings.budget_s, progress=progress
    )
    rates = before.best(measure_rates(device, settings.dtype))
    table = SpeedTable(
        num_frames=size.num_frames,
        height=size.height,
        width=size.width,
        dtype=str(settings.dtype).removeprefix("torch."),
        rows=_rows(entries, results, grid, settings.dtype),
        matmul_gflop_per_s=rates.matmul_gflop_per_s,
        copy_gbyte_per_s=rates.copy_gbyte_per_s,
        label=label,
    )
    return table, tuple(dict.fromkeys(notes))


def _baselines(original: Decoder, latents: Latents, settings: SpeedSettings, notes: list[str]) -> list[_Entry]:
    """The original as diffusers runs it, if it can, then as we run it without any of our improvements."""
    entries: list[_Entry] = []
    fault = diffusers_fault(original)
    if fault is None:
        refusal = refusal_at_chunk_one(original.spec, latents)
        contestant = Contestant(DIFFUSERS, lambda: diffusers_call(original, latents), refusal)
        entries.append(_entry(contestant, original, original.spec, settings, "" if refusal else "as it comes"))
    else:
        notes.append(f"the eager baseline is our own decoder with plain operators: {fault}")
    entries.append(_own_entry(EAGER, original, latents, PLAIN_EAGER, settings))
    return entries


def _tuned_entry(
    name: str, decoder: Decoder, latents: Latents, settings: SpeedSettings, notes: list[str], progress: Progress
) -> _Entry:
    choice = Choice(compile=settings.compile, chunk=settings.chunk)
    if settings.autotune:
        limits = Limits(settings.chunk, settings.tile, settings.max_memory_bytes)
        choice, note = tuned_choice(name, decoder, latents, limits, with_compile=settings.compile, progress=progress)
        notes.append(note)
    return _own_entry(name, decoder, latents, choice, settings)


def _own_entry(name: str, decoder: Decoder, latents: Latents, choice: Choice, settings: SpeedSettings) -> _Entry:
    spec = exact_spec(decoder.spec, device_type=latents.device.type) if choice.exact else decoder.spec
    limits = Limits(choice.chunk or settings.chunk, settings.tile, settings.max_memory_bytes)
    choice = replace(choice, chunk=limits.chunk)
    fit = fit_to_memory(
        spec, latents, limits, channels_last=choice.memory_format == "channels-last", compiled=choice.compile
    )
    way = "" if fit.refusal else f"{choice}{fit.remark}"
    contestant = Contestant(name, lambda: own_call(decoder, latents, choice, fit.limits), fit.refusal)
    return _entry(contestant, decoder, counted_spec(spec, settings.dtype), settings, way, compiled=choice.compile)


def counted_spec(spec: DecoderSpec, dtype: torch.dtype) -> DecoderSpec:
    """The spec with the operators that really run: in half precision `winograd3d` runs as `tapwise3d`."""
    if dtype.itemsize > 2:
        return spec
    changed = {
        address: block.model_copy(
            update={
                name: layer.model_copy(update={"operator": "tapwise3d"})
                for name, layer in block.layers.items()
                if layer.operator == "winograd3d"
            }
        )
        for address, block in spec.blocks()
    }
    return spec.with_blocks(changed)


def _entry(
    contestant: Contestant,
    decoder: Decoder,
    spec: DecoderSpec,
    settings: SpeedSettings,
    way: str,
    *,
    compiled: bool = False,
) -> _Entry:
    return _Entry(contestant, spec, decoder.parameter_count * settings.dtype.itemsize, way, compiled)


def _rows(entries: list[_Entry], results: list[ContestResult], grid: Grid, dtype: torch.dtype) -> tuple[SpeedRow, ...]:
    baseline = baseline_of(results)
    eager = None if baseline is None else baseline.speed
    tuned = next(result.speed for result in results if result.name == EXACT)
    return tuple(
        SpeedRow(
            name=result.name,
            seconds=seconds_of_rounds(result.speed),
            over_eager=None if result is baseline else ratio_of_rounds(eager, result.speed),
            over_exact=None if result.name == EXACT else ratio_of_rounds(tuned, result.speed),
            peak_bytes=_peak_bytes(entry, result),
            gflop=total_gflop(entry.spec, grid),
            traffic_bytes=traffic_elements(entry.spec, grid) * dtype.itemsize,
            cold_start_s=result.cold_start_s,
            compile_s=result.compile_s if entry.compiled else None,
            way=entry.way,
            failure=result.failure and ("out of memory" if entry.contestant.refusal is None else "does not fit"),
        )
        for entry, result in zip(entries, results, strict=True)
    )


def baseline_of(rows: Sequence[RowT]) -> RowT | None:
    """The eager row that the others are compared with: diffusers', or our own where that was not timed."""
    return next((row for row in rows if row.name in (DIFFUSERS, EAGER) and row.failure is None), None)


def seconds_of_rounds(speed: SpeedResult | None) -> Spread | None:
    """Seconds a decoding takes; None if it was not timed."""
    return None if speed is None else Spread(speed.median, speed.min, speed.max, len(speed.seconds))


def ratio_of_rounds(baseline: SpeedResult | None, speed: SpeedResult | None) -> Spread | None:
    """How many times faster `speed` is than `baseline`, round by round; None if either was not timed."""
    if baseline is None or speed is None:
        return None
    ratio = speed_ratio(baseline, speed)
    return Spread(ratio.median, ratio.min, ratio.max, len(ratio.ratios))


def _peak_bytes(entry: _Entry, result: ContestResult) -> int | None:
    if result.memory is None or result.memory.num_bytes is None:
        return None
    return result.memory.num_bytes + entry.weight_bytes
