"""HunyuanVideo's VAE: causal 3D layers that repeat the borders of frames, GroupNorm and attention over whole clips.

4 x 8 x 8 pixels per latent of 16 channels. A diffusion model takes raw * 0.476986, so the deviation is its inverse.

Reference: HunyuanVideo, arXiv 2412.03603; diffusers `AutoencoderKLHunyuanVideo`. The paper of Flash-VAED has no layout
for it: stages, ratio and operators are those that it gives Wan 2.1, whose resolutions are the same.
"""

from __future__ import annotations

import math
from itertools import pairwise

from flashvaed_cli.decoders.spec.blocks import (
    AttentionSpec,
    BlockSpec,
    ConvBlockSpec,
    HeadSpec,
    ResBlockSpec,
    StridedDownsampleSpec,
    UpsampleSpec,
)
from flashvaed_cli.decoders.spec.coders import DecoderSpec, EncoderSpec, StageSpec, TemporalTiles
from flashvaed_cli.decoders.spec.layers import ConvSpec, Factor, NormSpec
from flashvaed_cli.families.family import ComfyUIReader, ConfigKeys, Family, OtherPrograms
from flashvaed_cli.families.stable_diffusion.config import (
    EACH_GROUPS,
    MULTIPLIERS,
    NUM_GROUPS,
    QUANT_KEYS,
    configured,
    described,
    post_quant_stage,
    quant_stage,
)
from flashvaed_cli.families.wan21.spec import point_conv

NAME = "hunyuanvideo"
TEMPORAL_FACTOR, SPATIAL_FACTOR = 4, 8
LATENT_WIDTH = 16
SCALING_FACTOR = 0.476986
TILES = TemporalTiles(length=5, stride=3)
"""Longer clips in tiles of 17 frames that begin 12 apart, blended over 4: the class's default. Tencent's own code has
tiles of 65 frames, 48 apart."""
_RESAMPLED: tuple[Factor, ...] = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
"""What three of four resolutions end with, in the encoder from the pixels on, in the decoder from the latents:
the largest frames of the encoder, and the smallest of the decoder, keep their number."""


def _conv(in_width: int, out_width: int) -> ConvSpec:
    """A dense causal 3x3x3 layer; before a clip comes its first frame again, around frames their border."""
    return ConvSpec(
        operator="causal3d",
        in_width=in_width,
        out_width=out_width,
        kernel=(3, 3, 3),
        time_padding="first",
        space_padding="replicate",
    )


def _norm(base_width: int) -> NormSpec:
    """The release's 32 groups; toys have as many as their base width can be parted into."""
    return NormSpec(eps=1e-6, shift=True, groups=math.gcd(NUM_GROUPS, base_width), over="clip")


def _resblock(in_width: int, out_width: int, norm: NormSpec) -> ResBlockSpec:
    return ResBlockSpec(
        conv1=_conv(in_width, out_width),
        conv2=_conv(out_width, out_width),
        shortcut=None if in_width == out_width else point_conv(in_width, out_width),
        norm=norm,
    )


def _mid_stage(width: int, norm: NormSpec) -> StageSpec:
    block = _resblock(width, width, norm)
    attention = AttentionSpec(width=width, inner_width=width, norm=norm, context="clip")
    return StageSpec(name="mid", blocks=(block, attention, block))


def hunyuan_decoder_spec(base_width: int, latent_width: int = LATENT_WIDTH) -> DecoderSpec:
    """The original decoder at a base width (128: the release)."""
    norm = _norm(base_width)
    widths = [base_width * m for m in (MULTIPLIERS[-1], *reversed(MULTIPLIERS))]
    stages = [
        post_quant_stage(latent_width),
        StageSpec(name="conv_in", blocks=(ConvBlockSpec(conv=_conv(latent_width, widths[0])),)),
        _mid_stage(widths[0], norm),
    ]
    for i, (in_width, width) in enumerate(pairwise(widths)):
        blocks: list[BlockSpec] = [_resblock(w, width, norm) for w in (in_width, width, width)]
        if i < len(_RESAMPLED):
            blocks.append(UpsampleSpec(spatial=_conv(width, width), repeats_frames=_RESAMPLED[i][0] == 2))
        stages.append(StageSpec(name=f"up{i}", blocks=tuple(blocks)))
    stages.append(StageSpec(name="head", blocks=(HeadSpec(conv=_conv(widths[-1], 3), norm=norm),)))
    return DecoderSpec(
        family=NAME,
        stages=tuple(stages),
        temporal_factor=TEMPORAL_FACTOR,
        spatial_factor=SPATIAL_FACTOR,
        temporal_tiles=TILES,
    )


def hunyuan_encoder_spec(base_width: int, latent_width: int = LATENT_WIDTH) -> EncoderSpec:
    """The original encoder at a base width (128: the release)."""
    norm = _norm(base_width)
    widths = [base_width * m for m in (1, *MULTIPLIERS)]
    stages = [StageSpec(name="conv_in", blocks=(ConvBlockSpec(conv=_conv(3, widths[0])),))]
    for i, (in_width, width) in enumerate(pairwise(widths)):
        blocks: list[BlockSpec] = [_resblock(in_width, width, norm), _resblock(width, width, norm)]
        if i < len(_RESAMPLED):
            blocks.append(StridedDownsampleSpec(conv=_conv(width, width), factor=_RESAMPLED[i]))
        stages.append(StageSpec(name=f"down{i}", blocks=tuple(blocks)))
    stages += [
        _mid_stage(widths[-1], norm),
        StageSpec(name="head", blocks=(HeadSpec(conv=_conv(widths[-1], 2 * latent_width), norm=norm),)),
        quant_stage(latent_width),
    ]
    return EncoderSpec(
        family=NAME,
        stages=tuple(stages),
        temporal_factor=TEMPORAL_FACTOR,
        spatial_factor=SPATIAL_FACTOR,
        temporal_tiles=TILES,
    )


_CONFIG_KEYS = ConfigKeys(
    fixed={
        "in_channels": (3,),
        "out_channels": (3,),
        "act_fn": ("silu",),
        "layers_per_block": (2,),
        "down_block_types": (("HunyuanVideoDownBlock3D",) * 4, ("DownEncoderBlockCausal3D",) * 4),
        "up_block_types": (("HunyuanVideoUpBlock3D",) * 4, ("UpDecoderBlockCausal3D",) * 4),
        "mid_block_add_attention": (True,),
        "spatial_compression_ratio": (SPATIAL_FACTOR,),
        "temporal_compression_ratio": (TEMPORAL_FACTOR,),
        "time_compression_ratio": (TEMPORAL_FACTOR,),  # as Tencent calls it
    },
    read=frozenset({"norm_num_groups", EACH_GROUPS, *QUANT_KEYS.values()}),
    idle=frozenset({"sample_size", "sample_tsize"}),
    latent_key="latent_channels",
    widths=dict.fromkeys(("decoder", "encoder"), (("block_out_channels", MULTIPLIERS),)),
    in_metadata=True,
    has_factors=True,
)

HUNYUAN_VIDEO = Family(
    name=NAME,
    decoder_spec=hunyuan_decoder_spec,
    encoder_spec=hunyuan_encoder_spec,
    latent_width=LATENT_WIDTH,
    latent_mean=(0.0,) * LATENT_WIDTH,
    latent_std=(1 / SCALING_FACTOR,) * LATENT_WIDTH,
    released_base_width=128,
    shallow_stages=("up2", "up3"),
    paper_keep_ratio=0.125,
    paper_operators={"mid": "dwsep3d", "up0": "dwsep3d", "up1": "dwsep3d", "up2": "frame2d", "up3": "frame2d"},
    config_keys=_CONFIG_KEYS,
    configured=configured,  # type: ignore[arg-type]
    described=described,
    native_obstacle=(
        "its stock class has one block_out_channels and one norm_num_groups for encoder and decoder, so none of the "
        "decoder's own"
    ),
    frames_per_second=24,
    elsewhere=OtherPrograms(
        repository="hunyuanvideo-community/HunyuanVideo", licence="other", comfyui=ComfyUIReader(), taehv=("taehv",)
    ),
)
