"""Wan 2.2: 48 latent channels, pixels in patches of 2 x 2, and a bypass around every stage that changes size.

Encoder (base width 160 in the released model) and decoder (256) have the blocks of Wan 2.1, but a resampler keeps its
width, and the next stage's first residual block changes it.

Reference: Wan 2.2 VAE. The paper has no layout for it: stages, ratio and operators are the paper's for Wan 2.1.
"""

from __future__ import annotations

from dataclasses import replace

from flashvaed_cli.decoders.spec.blocks import UpsampleSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec, EncoderSpec
from flashvaed_cli.decoders.spec.convolutions import frame_conv, time_conv
from flashvaed_cli.families.family import ComfyUIReader, Family
from flashvaed_cli.families.wan21.spec import (
    CONFIG_KEYS,
    DOUBLES,
    HALVES,
    LADDER,
    MULTIPLIERS,
    WAN21,
    wan_downsampler,
)

NAME = "wan2.2"
LATENT_WIDTH = 48
PATCH = 2
TEMPORAL_FACTOR, SPATIAL_FACTOR = 4, 16

# Per-channel statistics of the released Wan 2.2 latents (they are not in the checkpoint).
LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


def wan22_decoder_spec(base_width: int, latent_width: int = LATENT_WIDTH) -> DecoderSpec:
    """The original decoder at a base width (256: the released Wan 2.2)."""
    widths = [base_width * m for m in reversed(MULTIPLIERS)]

    def upsampler(index: int, width: int) -> UpsampleSpec:
        temporal = time_conv(width, 2 * width) if DOUBLES[index] else None
        return UpsampleSpec(temporal=temporal, spatial=frame_conv(width, width))

    stages = LADDER.decoder_stages(latent_width, widths, upsampler, out_width=3 * PATCH**2, doubles=DOUBLES)
    return DecoderSpec(
        family=NAME,
        stages=tuple(stages),
        temporal_factor=TEMPORAL_FACTOR,
        spatial_factor=SPATIAL_FACTOR,
        patch=PATCH,
    )


def wan22_encoder_spec(base_width: int, latent_width: int = LATENT_WIDTH) -> EncoderSpec:
    """The original encoder at a base width (160: the released Wan 2.2)."""
    widths = [base_width * m for m in MULTIPLIERS]
    stages = LADDER.encoder_stages(latent_width, widths, wan_downsampler, in_width=3 * PATCH**2, halves=HALVES)
    return EncoderSpec(
        family=NAME,
        stages=tuple(stages),
        temporal_factor=TEMPORAL_FACTOR,
        spatial_factor=SPATIAL_FACTOR,
        patch=PATCH,
    )


WAN22 = Family(
    name=NAME,
    decoder_spec=wan22_decoder_spec,
    encoder_spec=wan22_encoder_spec,
    latent_width=LATENT_WIDTH,
    latent_mean=LATENT_MEAN,
    latent_std=LATENT_STD,
    released_base_width=256,
    shallow_stages=WAN21.shallow_stages,
    paper_keep_ratio=WAN21.paper_keep_ratio,
    paper_operators=WAN21.paper_operators,
    frames_per_second=24,
    elsewhere=replace(
        WAN21.elsewhere,
        repository="Wan-AI/Wan2.2-TI2V-5B",
        diffusers_arguments={
            "is_residual": True,
            "in_channels": 3 * PATCH**2,
            "out_channels": 3 * PATCH**2,
            "patch_size": PATCH,
        },
        reads_single_file=False,  # the converter knows Wan 2.1's names only
        comfyui=ComfyUIReader(),
        taehv=("taew2_2", "taew2_2_super"),
    ),
    config_keys=replace(
        CONFIG_KEYS,
        fixed={
            **CONFIG_KEYS.fixed,
            "is_residual": (True,),
            "in_channels": (3 * PATCH**2,),
            "out_channels": (3 * PATCH**2,),
            "patch_size": (PATCH,),
        },
    ),
)
