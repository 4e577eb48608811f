"""`prune --layout native --with-encoder`: narrow the encoder to the width of the native decoder.

Some programs (ComfyUI from 0.8, LightX2V) build encoder and decoder at one width. The encoder is narrowed like the
decoder, by the same selection and least squares, against the outputs of the original's layers on the clips.
"""

from __future__ import annotations

import math

import torch

from flashvaed_cli.artifact.checkpoint import Checkpoint
from flashvaed_cli.artifact.measured import EncoderFigures
from flashvaed_cli.calibrate.statistics import collect_statistics
from flashvaed_cli.decoders.modules.coder import Decoder, Encoder
from flashvaed_cli.decoders.run.streaming import decode, encode
from flashvaed_cli.errors import SpecError
from flashvaed_cli.families.registry import encoder_like
from flashvaed_cli.metrics.quality import PSNR_CAP_DB, compare_frames
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.prune import PruneRecipe
from flashvaed_cli.stages.common.clips import CalibrationClips
from flashvaed_cli.stages.common.reconstruction import fit_settings, layer_figures, reconstruct
from flashvaed_cli.surgery.native import select_native
from flashvaed_cli.surgery.transfer import transfer_weights


def narrow_encoder(
    original: Checkpoint,
    decoder: Decoder,
    base_width: int,
    clips: CalibrationClips,
    recipe: PruneRecipe,
    progress: Progress,
) -> tuple[Encoder, EncoderFigures]:
    """The original's encoder at a base width, and its quality.

    Args:
        decoder: the narrowed one, which decodes for the figures.
    Raises:
        ArtifactError: the original has no encoder.
        SpecError: all calibration data are latents, which an encoder cannot be fitted to.
    """
    encoder = original.require_encoder()
    if not clips.requests:
        raise SpecError("--with-encoder needs videos, and --data names latents only. Add a video, or leave it out")
    spec = encoder_like(encoder.spec)(base_width, encoder.spec.latent_width)
    statistics = collect_statistics(encoder, clips.pixels(), num_clips=len(clips.requests), progress=progress)
    kept, _ = select_native(encoder, statistics, spec, rule=recipe.rule, seed=recipe.seed)
    narrowed = transfer_weights(encoder, spec, kept)
    errors = []
    if recipe.reconstruct != "none":
        pixels = list(clips.pixels())
        errors = reconstruct(encoder, narrowed, encoder, kept, pixels, fit_settings(recipe), progress)
    record = EncoderFigures(
        parameters_before=encoder.parameter_count,
        parameters_after=narrowed.parameter_count,
        layer_errors=layer_figures(errors),
        **_quality(encoder, narrowed, decoder, clips),
    )
    return narrowed, record


@torch.no_grad()
def _quality(encoder: Encoder, narrowed: Encoder, decoder: Decoder, clips: CalibrationClips) -> dict[str, float]:
    """On the calibration clips: the share of the latents' variance that is missed, and the PSNR of videos that go
    through each encoder and the narrowed decoder."""
    missed, variance, psnr = 0.0, 0.0, {"original": 0.0, "narrowed": 0.0}
    for pixels in clips.pixels():
        ours, theirs = encode(narrowed, pixels), encode(encoder, pixels)
        missed += float((ours - theirs).square().sum())
        variance += float((theirs - theirs.mean(dim=(0, 2, 3, 4), keepdim=True)).square().sum())
        for name, latents in (("original", theirs), ("narrowed", ours)):
            quality = compare_frames(decode(decoder, latents), pixels)
            psnr[name] += min(quality.psnr_db, PSNR_CAP_DB) / len(clips.requests)
    return {
        "latent_error": missed / variance if variance > 0 else math.nan,
        "psnr_db_with_original_encoder": psnr["original"],
        "psnr_db": psnr["narrowed"],
    }
