"""The latency model of pruning: `analyze` measures and stores it, `prune --target-speedup` reads or measures it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.artifact.measured import BlockTimes, Conditions, WidthTimes
from flashvaed_cli.calibrate.width_latency import measure_width_latency
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.predict.cost import Grid
from flashvaed_cli.decoders.predict.latency import BlockLatency, WidthLatency
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.metrics.module_times import profile_modules
from flashvaed_cli.metrics.speed import synchronizer
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.analyze import AnalyzeRecipe
from flashvaed_cli.recipe.prune import PruneRecipe
from flashvaed_cli.stages.common.loading import DTYPES
from flashvaed_cli.surgery.respec import spec_of_widths

LAYOUT = "channels-last, exact operators"
_NUM_ROUNDS = 7


@dataclass(frozen=True)
class TimedClip:
    """Size of the clip whose decoding is timed, in pixels, and how it is decoded."""

    num_frames: int
    side: int
    device: torch.device
    dtype: str

    def grid(self, spec: DecoderSpec) -> Grid:
        """The frames, height and width of its latents."""
        side = -(-self.side // spec.spatial_factor)
        return (spec.num_latents(self.num_frames), side, side)

    def latents(self, spec: DecoderSpec, seed: int) -> Float[Tensor, "1 C T Hz Wz"]:
        """Random latents of that size."""
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(1, spec.latent_width, *self.grid(spec), generator=generator)
        return latents.to(self.device, DTYPES[self.dtype])

    def conditions(self) -> Conditions:
        """The conditions under which times are comparable."""
        return Conditions(
            num_frames=self.num_frames,
            side=self.side,
            device=self.device.type,
            num_threads=torch.get_num_threads() if self.device.type == "cpu" else None,
            dtype=self.dtype,
            layout=LAYOUT,
        )


def whole_clip(
    clip: TimedClip, spec: DecoderSpec, recipe: AnalyzeRecipe | PruneRecipe, progress: Progress
) -> TimedClip:
    """The clip with frames and side rounded up to whole latents, as it is decoded; warns of values the user gave."""
    num_latents, side, _ = clip.grid(spec)
    whole = replace(clip, num_frames=spec.num_frames(num_latents), side=spec.spatial_factor * side)
    rounded, reasons = [], []
    if whole.num_frames != clip.num_frames and recipe.given("latency_frames"):
        rounded.append(f"--latency-frames {clip.num_frames} is timed as {whole.num_frames}")
        reasons.append("single frames" if spec.still else f"1 + {spec.temporal_factor} n frames")
    if whole.side != clip.side:
        rounded.append(f"--latency-side {clip.side} is timed as {whole.side}")
        reasons.append(f"sides that {spec.spatial_factor} divides")
    if rounded:
        progress.warn(f"{' and '.join(rounded)}: this decoder takes {' and '.join(reasons)}")
    return whole


def measure_width_times(
    decoder: Decoder, clip: TimedClip, *, budget_s: float, seed: int, progress: Progress
) -> WidthTimes:
    """Measure the latency model of a decoder.

    Args:
        decoder: left as it is.
        budget_s: roughly how long to measure; slow decoders get fewer widths and rounds.
    """
    stages = get_family(decoder.spec.family).shallow_stages
    profile = partial(profile_modules, synchronize=synchronizer(clip.device))
    model = measure_width_latency(
        decoder,
        clip.latents(decoder.spec, seed),
        stages,
        narrow=spec_of_widths,
        profile=profile,
        num_rounds=_NUM_ROUNDS,
        budget_s=budget_s,
        progress=progress,
    )
    blocks = tuple(
        BlockTimes(block=block.address, axes=block.axes, widths=block.widths, latency_ms=block.latency_ms)
        for block in model.blocks
    )
    return WidthTimes(
        **clip.conditions().as_json(),
        stages=tuple(stages),
        fixed_ms=model.fixed_ms,
        blocks=blocks,
        ladders=dict(model.ladders),
    )


def width_latency(times: WidthTimes) -> WidthLatency:
    """The model to compute with.

    Raises:
        ValueError: the times of a block do not fill its grid.
    """
    blocks = tuple(BlockLatency(one.block, one.axes, one.widths, one.latency_ms) for one in times.blocks)
    return WidthLatency(times.fixed_ms, blocks, times.ladders)


def stored_model(times: WidthTimes | None, clip: TimedClip) -> tuple[WidthLatency | None, str]:
    """The model of an analysis, or None and why it does not apply to a clip."""
    if times is None:
        return None, "the analysis holds no latency model"
    found, wanted = times.as_json(), clip.conditions().as_json()
    different = [f"{name} {found[name]} instead of {value}" for name, value in wanted.items() if found[name] != value]
    if different:
        return None, f"the analysis's latency model is for {', '.join(different)}"
    try:
        return width_latency(times), ""
    except ValueError:
        return None, "the analysis's latency model is damaged"
