"""Qwen-Image 2: Wan 2.2's blocks on frames alone, five resolutions, 64 latent channels, for single images.

The original takes and returns images with transparency. Here they are opaque: the encoder reads an opacity of 1
(`EncoderSpec.opaque`), and the decoder lacks its fourth output. Its temporal resamplers, which images never reach, are
left out.

Reference: Qwen-Image 2 VAE (diffusers `AutoencoderKLQwenImage21`). The paper has no layout for it: ratio and operators
are the paper's for Wan 2.1.
"""

from __future__ import annotations

from dataclasses import replace

from flashvaed_cli.decoders.spec.blocks import DownsampleSpec, UpsampleSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec, EncoderSpec
from flashvaed_cli.decoders.spec.convolutions import frame_conv
from flashvaed_cli.families.family import Family
from flashvaed_cli.families.ladder import Ladder
from flashvaed_cli.families.wan21.spec import CONFIG_KEYS

NAME = "qwen-image-2"
LATENT_WIDTH = 64
MULTIPLIERS = (1, 2, 4, 8, 8)
COLOURS = 4  # of the original: red, green, blue and opacity
TEMPORAL_FACTOR, SPATIAL_FACTOR = 8, 16
# Which transitions between resolutions would double the frames of a video; their bypasses copy other channels for that,
# even for a single image.
DOUBLED = (False, True, True, True)
_LADDER = Ladder(frame_conv)

# Per-channel statistics of the released Qwen-Image 2 latents (its diffusers configuration).
LATENT_MEAN = (
    0.5126, 0.7721, -0.0631, 1.3506, -0.7855, -2.1025, -0.3458, 1.3722,
    1.8873, -1.7177, -0.6510, 0.2732, 0.7562, -0.6163, -1.0277, 3.8363,
    2.0210, 0.0472, 0.9320, 2.0087, 2.4954, -0.1391, -1.4249, 1.8464,
    -0.5236, 1.2826, 3.7046, -1.3035, 2.7286, -1.4518, -1.9036, -1.9955,
    -0.0342, -1.0265, -0.7636, 3.0555, 0.0746, -3.0751, -0.1076, 1.7376,
    -1.0914, -1.9435, -0.2784, -1.3680, 0.4809, -0.4433, 0.3764, 0.5729,
    -2.0595, 1.0960, -1.3260, -2.0211, -5.0179, 0.5275, 4.0162, 1.8505,
    0.3026, 1.9373, 1.4937, 0.2632, 0.5547, -1.7121, -0.1562, 0.0304,
)  # fmt: skip
LATENT_STD = (
    3.2001, 3.2936, 3.4321, 3.0091, 3.1061, 4.0379, 4.0705, 3.7910,
    3.0785, 3.6500, 3.9308, 3.0904, 2.8778, 3.7675, 3.7320, 5.0756,
    3.2864, 4.0397, 3.1317, 4.0443, 2.9249, 3.9454, 3.0988, 4.2489,
    3.4896, 3.8513, 3.9323, 3.4719, 3.7498, 4.2830, 3.5694, 4.2467,
    3.9037, 3.2947, 5.0770, 3.5075, 3.2700, 3.4767, 2.8063, 5.1125,
    3.5327, 4.7833, 3.1286, 4.1819, 3.8527, 3.8312, 3.5605, 4.3875,
    3.9624, 4.0168, 3.5643, 4.0550, 5.5614, 4.2963, 4.4080, 3.4959,
    3.8747, 3.7608, 3.5735, 3.1490, 3.7662, 3.6746, 3.4563, 3.8161,
)  # fmt: skip


def qwen2_decoder_spec(base_width: int, latent_width: int = LATENT_WIDTH) -> DecoderSpec:
    """The original decoder at a base width (144: the released Qwen-Image 2)."""
    widths = [base_width * m for m in reversed(MULTIPLIERS)]

    def upsampler(_index: int, width: int) -> UpsampleSpec:
        return UpsampleSpec(spatial=frame_conv(width, width))

    stages = _LADDER.decoder_stages(latent_width, widths, upsampler, doubles=DOUBLED[::-1])
    return DecoderSpec(
        family=NAME,
        stages=tuple(stages),
        temporal_factor=TEMPORAL_FACTOR,
        spatial_factor=SPATIAL_FACTOR,
        still=True,
    )


def qwen2_encoder_spec(base_width: int, latent_width: int = LATENT_WIDTH) -> EncoderSpec:
    """The original encoder at a base width (96: the released Qwen-Image 2)."""
    widths = [base_width * m for m in MULTIPLIERS]

    def downsampler(_index: int, width: int) -> DownsampleSpec:
        return DownsampleSpec(spatial=frame_conv(width, width))

    stages = _LADDER.encoder_stages(latent_width, widths, downsampler, in_width=COLOURS, halves=DOUBLED)
    return EncoderSpec(
        family=NAME,
        stages=tuple(stages),
        temporal_factor=TEMPORAL_FACTOR,
        spatial_factor=SPATIAL_FACTOR,
        still=True,
        opaque=True,
    )


QWEN_IMAGE_2 = Family(
    name=NAME,
    decoder_spec=qwen2_decoder_spec,
    encoder_spec=qwen2_encoder_spec,
    latent_width=LATENT_WIDTH,
    latent_mean=LATENT_MEAN,
    latent_std=LATENT_STD,
    released_base_width=144,
    shallow_stages=("up3", "up4"),
    paper_keep_ratio=0.125,
    paper_operators={
        "mid": "dwsep3d",
        "up0": "dwsep3d",
        "up1": "dwsep3d",
        "up2": "dwsep3d",
        "up3": "frame2d",
        "up4": "frame2d",
    },
    config_keys=replace(
        CONFIG_KEYS,
        fixed={
            **CONFIG_KEYS.fixed,
            "dim_mult": (MULTIPLIERS,),
            "temperal_downsample": (DOUBLED,),
            "is_residual": (True,),
            "in_channels": (COLOURS,),
            "out_channels": (COLOURS,),
        },
    ),
)
