"""Time the decoders of an evaluation in alternation, on the first latents of a clip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.variants.exact import exact_decoder
from flashvaed_cli.metrics.speed import SpeedResult, speed_ratio, synchronizer, time_alternating
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.evaluate import EvalRecipe
from flashvaed_cli.recipe.quantities import parse_memory
from flashvaed_cli.report.evaluation import DecoderFigures, Spread
from flashvaed_cli.report.pipeline import PipelineShare
from flashvaed_cli.stages.common.loading import DTYPES
from flashvaed_cli.stages.evaluate.compare import ORIGINAL

ORIGINAL_TUNED = "original, exact"


def runtime_of(name: str, decoder: Decoder, recipe: EvalRecipe) -> DecodeRuntime:
    """The runtime of a decoder within the recipe's limits; the original runs as in plain torch."""
    settings = DecodeSettings(
        chunk=recipe.chunk,
        tile=recipe.tile,
        memory_format="contiguous" if name == ORIGINAL else "channels-last",
        max_memory_bytes=None if recipe.max_memory is None else parse_memory(recipe.max_memory),
    )
    return DecodeRuntime(decoder, settings)


@torch.no_grad()
def timed(
    figures: list[DecoderFigures],
    runtimes: Mapping[str, DecodeRuntime],
    original: Decoder,
    latents: Float[Tensor, "1 C T Hz Wz"],
    recipe: EvalRecipe,
    device: torch.device,
    progress: Progress,
) -> list[DecoderFigures]:
    """Frames per second of every decoder, and of the original with the exact operators that the derived ones run."""
    latents = latents.to(DTYPES[recipe.dtype])
    contest = dict(runtimes)
    if len(contest) > 1:
        contest[ORIGINAL_TUNED] = runtime_of(ORIGINAL_TUNED, exact_decoder(original), recipe)
        figures = [figures[0], DecoderFigures(name=ORIGINAL_TUNED), *figures[1:]]
    candidates = {name: partial(runtime.decode, latents) for name, runtime in contest.items()}
    speeds = time_alternating(
        candidates,
        num_rounds=recipe.num_speed_rounds,
        budget_s=recipe.speed_budget,
        synchronize=synchronizer(device),
        progress=progress,
    )
    num_frames = original.spec.num_frames(latents.shape[2])
    return [_with_speed(one, speeds, num_frames, recipe.pipeline_seconds) for one in figures]


def _with_speed(
    figures: DecoderFigures, speeds: dict[str, SpeedResult], num_frames: int, rest_s: float | None
) -> DecoderFigures:
    speed = speeds[figures.name]
    ratio = speed_ratio(speeds[ORIGINAL], speed)
    num_rounds = len(ratio.ratios)
    spread = None if figures.name == ORIGINAL else Spread(ratio.median, ratio.min, ratio.max, num_rounds)
    per_second = speed.per_second(num_frames)
    original_s = num_frames / speeds[ORIGINAL].per_second(num_frames)
    pipeline = None if rest_s is None else PipelineShare(rest_s, num_frames / per_second, original_s)
    return replace(figures, frames_per_second=per_second, speedup=spread, pipeline=pipeline)
