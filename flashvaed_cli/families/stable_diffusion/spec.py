"""Stable Diffusion's VAE and its relatives: one network of 2D layers and GroupNorm, for each frame by itself.

Four variants, which differ in the latents: SD 1 and 2 (4 channels), SDXL (4), SD 3 (16) and FLUX.1 (16, the last two
without the 1x1 layers around the latent). A diffusion model takes (raw - shift_factor) * scaling_factor, so in our
terms the mean is the shift and the deviation 1 / scaling_factor, the same for all channels.

The temporal factor is 1: a clip of T latents gives T frames, each independent of the others.

Reference: Latent Diffusion, arXiv 2112.10752; diffusers `AutoencoderKL`. The paper has no layout for it: stages and
ratio are the paper's for Wan 2.1; the layers of up2 and up3 are 2D already.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from flashvaed_cli.decoders.spec.blocks import DownsampleSpec, UpsampleSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec, EncoderSpec
from flashvaed_cli.decoders.spec.convolutions import frame_conv
from flashvaed_cli.decoders.spec.layers import NormSpec
from flashvaed_cli.families.family import ComfyUIReader, Family, OtherPrograms
from flashvaed_cli.families.ladder import Ladder
from flashvaed_cli.families.stable_diffusion.config import (
    CONFIG_KEYS,
    MULTIPLIERS,
    NUM_GROUPS,
    configured,
    contradictions,
    described,
)
from flashvaed_cli.families.wan21.spec import WAN21

SPATIAL_FACTOR = 8
BASE_WIDTH = 128


def group_norm(base_width: int) -> NormSpec:
    """GroupNorm with the releases' 32 groups; with fewer if they do not divide the base width."""
    return NormSpec(eps=1e-6, shift=True, groups=math.gcd(NUM_GROUPS, base_width))


def frame_upsampler(_index: int, width: int) -> UpsampleSpec:
    """Doubles the size, frame by frame."""
    return UpsampleSpec(spatial=frame_conv(width, width))


def _frame_downsampler(_index: int, width: int) -> DownsampleSpec:
    return DownsampleSpec(spatial=frame_conv(width, width))


def kl_decoder_spec(family: str, has_quant: bool, base_width: int, latent_width: int) -> DecoderSpec:
    """The original decoder of a variant at a base width (128: the releases)."""
    ladder, widths = Ladder(frame_conv, group_norm(base_width)), [base_width * m for m in reversed(MULTIPLIERS)]
    stages = ladder.decoder_stages(latent_width, widths, frame_upsampler, has_quant=has_quant)
    return DecoderSpec(family=family, stages=tuple(stages), temporal_factor=1, spatial_factor=SPATIAL_FACTOR)


def kl_encoder_spec(family: str, has_quant: bool, base_width: int, latent_width: int) -> EncoderSpec:
    """The original encoder of a variant at a base width (128: the releases)."""
    ladder, widths = Ladder(frame_conv, group_norm(base_width)), [base_width * m for m in MULTIPLIERS]
    stages = ladder.encoder_stages(latent_width, widths, _frame_downsampler, has_quant=has_quant)
    return EncoderSpec(family=family, stages=tuple(stages), temporal_factor=1, spatial_factor=SPATIAL_FACTOR)


def kl_family(
    name: str, latent_width: int, scaling_factor: float, shift_factor: float = 0.0, *, has_quant: bool
) -> Family:
    """A variant whose latents are scaled by one factor: of `AutoencoderKL`, or of a class with a similar network."""
    return Family(
        name=name,
        decoder_spec=partial(kl_decoder_spec, name, has_quant),
        encoder_spec=partial(kl_encoder_spec, name, has_quant),
        latent_width=latent_width,
        latent_mean=(shift_factor,) * latent_width,
        latent_std=(1 / scaling_factor,) * latent_width,
        released_base_width=BASE_WIDTH,
        shallow_stages=WAN21.shallow_stages,
        paper_keep_ratio=WAN21.paper_keep_ratio,
        paper_operators=WAN21.paper_operators,
        config_keys=replace(CONFIG_KEYS, contradictions=partial(contradictions, name, latent_width)),
        configured=configured,  # type: ignore[arg-type]
        described=described,
        native_obstacle=(
            "its stock class has one block_out_channels and one norm_num_groups for encoder and decoder, so no "
            "separate ones for the decoder"
        ),
        elsewhere=OtherPrograms(reads_single_file=True, comfyui=ComfyUIReader(has_node=False)),
    )


SD = kl_family("stable-diffusion", 4, 0.18215, has_quant=True)
SDXL = kl_family("sdxl", 4, 0.13025, has_quant=True)
SD_3 = kl_family("sd3", 16, 1.5305, 0.0609, has_quant=False)
FLUX_1 = kl_family("flux.1", 16, 0.3611, 0.1159, has_quant=False)
