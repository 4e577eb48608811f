"""Wan 2.1: the original's specs for any base width, its latent statistics, and the paper's layout.

Encoder and decoder have four resolutions. The decoder's widths for mid, up0, up1, up2 and up3 are 4, 4, 4, 2 and 1
times the base width (96 in the released model, 16 in `builtin:tiny-wan`).

Reference: Wan 2.1 VAE; arXiv 2602.19161, table of the operator layout.
"""

from __future__ import annotations

from flashvaed_cli.decoders.spec.blocks import DownsampleSpec, UpsampleSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec, EncoderSpec
from flashvaed_cli.decoders.spec.convolutions import causal_conv, frame_conv, time_conv
from flashvaed_cli.families.family import ComfyUIReader, ConfigKeys, Family, OtherPrograms
from flashvaed_cli.families.ladder import Ladder

NAME = "wan2.1"
LATENT_WIDTH = 16
MULTIPLIERS = (1, 2, 4, 4)
TEMPORAL_FACTOR, SPATIAL_FACTOR = 4, 8
HALVES = (False, True, True)
"""Which of the encoder's resamplers, from the pixels on, halve the frames too."""
DOUBLES = HALVES[::-1]
LADDER = Ladder(causal_conv)

# Per-channel statistics of the released Wan 2.1 latents (diffusers `AutoencoderKLWan` configuration).
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


def wan_decoder_spec(base_width: int, latent_width: int = LATENT_WIDTH) -> DecoderSpec:
    """The original decoder at a base width (96: the released Wan 2.1)."""
    widths = [base_width * m for m in reversed(MULTIPLIERS)]

    def upsampler(index: int, width: int) -> UpsampleSpec:
        temporal = time_conv(width, 2 * width) if DOUBLES[index] else None
        return UpsampleSpec(temporal=temporal, spatial=frame_conv(width, width // 2))

    stages = LADDER.decoder_stages(latent_width, widths, upsampler)
    return DecoderSpec(
        family=NAME, stages=tuple(stages), temporal_factor=TEMPORAL_FACTOR, spatial_factor=SPATIAL_FACTOR
    )


def wan_downsampler(index: int, width: int) -> DownsampleSpec:
    """Halves the size; from the second resampler on, also the frames."""
    temporal = time_conv(width, width) if HALVES[index] else None
    return DownsampleSpec(spatial=frame_conv(width, width), temporal=temporal)


def wan_encoder_spec(base_width: int, latent_width: int = LATENT_WIDTH) -> EncoderSpec:
    """The original encoder at a base width (96: the released Wan 2.1)."""
    stages = LADDER.encoder_stages(latent_width, [base_width * m for m in MULTIPLIERS], wan_downsampler)
    return EncoderSpec(
        family=NAME, stages=tuple(stages), temporal_factor=TEMPORAL_FACTOR, spatial_factor=SPATIAL_FACTOR
    )


CONFIG_KEYS = ConfigKeys(
    fixed={
        "dim_mult": (MULTIPLIERS,),
        "num_res_blocks": (2,),
        "attn_scales": ((),),
        "temperal_downsample": (HALVES,),
        "is_residual": (False,),
        "in_channels": (3,),
        "input_channels": (3,),
        "out_channels": (3,),
        "patch_size": (None, 1),
    },
    idle=frozenset({"dropout", "clip_output", "scale_factor_temporal", "scale_factor_spatial"}),
    widths={"decoder": (("decoder_base_dim", None), ("base_dim", None)), "encoder": (("base_dim", None),)},
)

WAN21 = Family(
    name=NAME,
    decoder_spec=wan_decoder_spec,
    encoder_spec=wan_encoder_spec,
    latent_width=LATENT_WIDTH,
    latent_mean=LATENT_MEAN,
    latent_std=LATENT_STD,
    released_base_width=96,
    shallow_stages=("up2", "up3"),
    paper_keep_ratio=0.125,
    paper_operators={"mid": "dwsep3d", "up0": "dwsep3d", "up1": "dwsep3d", "up2": "frame2d", "up3": "frame2d"},
    config_keys=CONFIG_KEYS,
    elsewhere=OtherPrograms(
        repository="Wan-AI/Wan2.1-T2V-14B",
        licence="apache-2.0",
        diffusers_arguments={},
        reads_single_file=True,
        comfyui=ComfyUIReader(any_width=True),
        taehv=("taew2_1",),
    ),
)
