"""The latency model of pruning as `analyze` stores it and `prune --target-speedup` reads it, or measures it anew.

The record `measured.width_latency` of an analysis:
    num_frames, side: size of the clip that was decoded.
    device, num_threads, dtype, layout: what it was decoded on and how.
    stages: the stages whose widths were varied, the family's shallow ones.
    fixed_ms: time of all blocks that their widths do not reach.
    blocks: per other block its address `block`, `axes` (one or two lists of channel groups), `widths` (per axis the
        coordinates: the group's width, the geometric mean of two groups' widths), and `latency_ms` (one value per grid
        point, the last axis fastest).
    ladders: the widths at which each channel group was measured, widest first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.calibrate.width_latency import measure_width_latency
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.predict.cost import Grid
from flashvaed_cli.decoders.predict.latency import WidthLatency
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
        """Its latents' frames, height and width."""
        side = -(-self.side // spec.spatial_factor)
        return (spec.num_latents(self.num_frames), side, side)

    def latents(self, spec: DecoderSpec, seed: int) -> Float[Tensor, "1 C T Hz Wz"]:
        """Random latents of that size."""
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(1, spec.latent_width, *self.grid(spec), generator=generator)
        return latents.to(self.device, DTYPES[self.dtype])

    def conditions(self) -> dict[str, Any]:
        """What makes times comparable."""
        return {
            "num_frames": self.num_frames,
            "side": self.side,
            "device": self.device.type,
            "num_threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "dtype": self.dtype,
            "layout": LAYOUT,
        }


def whole_clip(
    clip: TimedClip, spec: DecoderSpec, recipe: AnalyzeRecipe | PruneRecipe, progress: Progress
) -> TimedClip:
    """The clip with frames and side rounded up to whole latents: what is decoded. What was asked for is said."""
    num_latents, side, _ = clip.grid(spec)
    whole = replace(clip, num_frames=spec.num_frames(num_latents), side=spec.spatial_factor * side)
    said, reasons = [], []
    if whole.num_frames != clip.num_frames and recipe.given("latency_frames"):
        said.append(f"--latency-frames {clip.num_frames} is timed as {whole.num_frames}")
        reasons.append("single frames" if spec.still else f"1 + {spec.temporal_factor} n frames")
    if whole.side != clip.side:
        said.append(f"--latency-side {clip.side} is timed as {whole.side}")
        reasons.append(f"sides that {spec.spatial_factor} divides")
    if said:
        progress.warn(f"{' and '.join(said)}: this decoder takes {' and '.join(reasons)}")
    return whole


def latency_model_record(
    decoder: Decoder, clip: TimedClip, *, budget_s: float, seed: int, progress: Progress
) -> dict[str, Any]:
    """Measure the latency model of a decoder; the record is described above.

    Args:
        decoder: left as it is.
        budget_s: about so many seconds; slow decoders get fewer widths and rounds.
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
    return {**clip.conditions(), "stages": list(stages), **model.as_record()}


def stored_model(record: Mapping[str, Any] | None, clip: TimedClip) -> tuple[WidthLatency | None, str]:
    """The model of a record, or None and why it does not hold for a clip."""
    if not isinstance(record, Mapping):
        return None, "the analysis holds no latency model"
    wanted = clip.conditions()
    different = [
        f"{name} {record.get(name)} instead of {value}" for name, value in wanted.items() if record.get(name) != value
    ]
    if different:
        return None, f"the analysis' latency model is for {', '.join(different)}"
    try:
        return WidthLatency.from_record(record), ""
    except (KeyError, TypeError, ValueError, IndexError):
        return None, "the analysis' latency model is damaged"
