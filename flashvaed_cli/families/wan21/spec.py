"""Wan 2.1: the original's specs for any base width, its latent statistics, and the paper's layout.

Encoder and decoder have four resolutions. The decoder's widths are 4, 4, 4, 2 and 1 times the base
width (96 in the released model, 16 in `builtin:tiny-wan`) for mid, up0, up1, up2 and up3.

Reference: Wan 2.1 VAE; arXiv 2602.19161, table of the operator layout.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from flashvaed_cli.decoders.spec.blocks import (
    AttentionSpec,
    BlockSpec,
    ConvBlockSpec,
    DownsampleSpec,
    HeadSpec,
    ResBlockSpec,
    UpsampleSpec,
)
from flashvaed_cli.decoders.spec.coders import DecoderSpec, EncoderSpec, StageSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec
from flashvaed_cli.families.family import ComfyUIReader, ConfigKeys, Family, OtherPrograms

NAME = "wan2.1"
LATENT_WIDTH = 16
MULTIPLIERS = (1, 2, 4, 4)
TEMPORAL_FACTOR, SPATIAL_FACTOR = 4, 8

# Per-channel statistics of the released Wan 2.1 latents (diffusers `AutoencoderKLWan` configuration).
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


def causal_conv(in_width: int, out_width: int) -> ConvSpec:
    """A dense causal 3x3x3 layer."""
    return ConvSpec(operator="causal3d", in_width=in_width, out_width=out_width, kernel=(3, 3, 3))


def frame_conv(in_width: int, out_width: int) -> ConvSpec:
    """A 3x3 layer on frames."""
    return ConvSpec(operator="frame2d", in_width=in_width, out_width=out_width, kernel=(1, 3, 3))


def time_conv(in_width: int, out_width: int) -> ConvSpec:
    """A causal layer over three frames."""
    return ConvSpec(operator="causal3d", in_width=in_width, out_width=out_width, kernel=(3, 1, 1))


def point_conv(in_width: int, out_width: int) -> ConvSpec:
    """A 1x1x1 layer."""
    return ConvSpec(operator="pointwise", in_width=in_width, out_width=out_width, kernel=(1, 1, 1))


def wan_resblock(in_width: int, out_width: int, conv: Callable[[int, int], ConvSpec] = causal_conv) -> ResBlockSpec:
    """Two dense layers, built by `conv`; a 1x1 shortcut where the width changes."""
    return ResBlockSpec(
        conv1=conv(in_width, out_width),
        conv2=conv(out_width, out_width),
        shortcut=None if in_width == out_width else point_conv(in_width, out_width),
    )


def mid_stage(width: int, conv: Callable[[int, int], ConvSpec] = causal_conv) -> StageSpec:
    """Two residual blocks around attention."""
    attention = AttentionSpec(width=width, inner_width=width)
    block = wan_resblock(width, width, conv)
    return StageSpec(name="mid", blocks=(block, attention, block))


def first_decoder_stages(latent_width: int, width: int) -> list[StageSpec]:
    """What a decoder begins with: a 1x1 layer on the latents, the entry, attention."""
    return [
        StageSpec(name="post_quant", blocks=(ConvBlockSpec(conv=point_conv(latent_width, latent_width)),)),
        StageSpec(name="conv_in", blocks=(ConvBlockSpec(conv=causal_conv(latent_width, width)),)),
        mid_stage(width),
    ]


def last_encoder_stages(width: int, latent_width: int) -> list[StageSpec]:
    """What an encoder ends with: attention, then mean and log-variance of every latent channel."""
    moments = 2 * latent_width
    return [
        mid_stage(width),
        StageSpec(name="head", blocks=(HeadSpec(conv=causal_conv(width, moments)),)),
        StageSpec(name="quant", blocks=(ConvBlockSpec(conv=point_conv(moments, moments)),)),
    ]


def wan_decoder_spec(base_width: int, latent_width: int = LATENT_WIDTH) -> DecoderSpec:
    """The original decoder at a base width (96: the released Wan 2.1)."""
    widths = [base_width * m for m in (MULTIPLIERS[-1], *reversed(MULTIPLIERS))]
    stages = first_decoder_stages(latent_width, widths[0])
    for i, (previous, width) in enumerate(pairwise(widths)):
        in_width = previous if i == 0 else previous // 2
        blocks: list[BlockSpec] = [wan_resblock(w, width) for w in (in_width, width, width)]
        if i < 3:
            temporal = time_conv(width, 2 * width) if i < 2 else None
            blocks.append(UpsampleSpec(temporal=temporal, spatial=frame_conv(width, width // 2)))
        stages.append(StageSpec(name=f"up{i}", blocks=tuple(blocks)))
    stages.append(StageSpec(name="head", blocks=(HeadSpec(conv=causal_conv(widths[-1], 3)),)))
    return DecoderSpec(
        family=NAME, stages=tuple(stages), temporal_factor=TEMPORAL_FACTOR, spatial_factor=SPATIAL_FACTOR
    )


def wan_encoder_spec(base_width: int, latent_width: int = LATENT_WIDTH) -> EncoderSpec:
    """The original encoder at a base width (96: the released Wan 2.1)."""
    widths = [base_width * m for m in (1, *MULTIPLIERS)]
    stages = [StageSpec(name="conv_in", blocks=(ConvBlockSpec(conv=causal_conv(3, widths[0])),))]
    for i, (in_width, width) in enumerate(pairwise(widths)):
        blocks: list[BlockSpec] = [wan_resblock(in_width, width), wan_resblock(width, width)]
        if i < 3:
            temporal = time_conv(width, width) if i > 0 else None
            blocks.append(DownsampleSpec(spatial=frame_conv(width, width), temporal=temporal))
        stages.append(StageSpec(name=f"down{i}", blocks=tuple(blocks)))
    stages += last_encoder_stages(widths[-1], latent_width)
    return EncoderSpec(
        family=NAME, stages=tuple(stages), temporal_factor=TEMPORAL_FACTOR, spatial_factor=SPATIAL_FACTOR
    )


CONFIG_KEYS = ConfigKeys(
    fixed={
        "dim_mult": (MULTIPLIERS,),
        "num_res_blocks": (2,),
        "attn_scales": ((),),
        "temperal_downsample": ((False, True, True),),
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
