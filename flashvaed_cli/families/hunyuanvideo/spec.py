"""HunyuanVideo's VAE: causal 3D layers that repeat frame borders, GroupNorm and attention over whole clips.

4 x 8 x 8 pixels per latent of 16 channels. A diffusion model takes raw * 0.476986, so the deviation is 1 / 0.476986.

Reference: HunyuanVideo, arXiv 2412.03603; diffusers `AutoencoderKLHunyuanVideo`. The Flash-VAED paper has no layout for
it: stages, ratio and operators are the paper's for Wan 2.1, which has the same resolutions.
"""

from __future__ import annotations

from dataclasses import replace

from flashvaed_cli.decoders.spec.blocks import StridedDownsampleSpec, UpsampleSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec, EncoderSpec, TemporalTiles
from flashvaed_cli.decoders.spec.layers import ConvSpec, Factor
from flashvaed_cli.families.family import ComfyUIReader, ConfigKeys, OtherPrograms
from flashvaed_cli.families.ladder import Ladder
from flashvaed_cli.families.stable_diffusion.config import EACH_GROUPS, MULTIPLIERS, QUANT_KEYS
from flashvaed_cli.families.stable_diffusion.spec import group_norm, kl_family

NAME = "hunyuanvideo"
TEMPORAL_FACTOR, SPATIAL_FACTOR = 4, 8
LATENT_WIDTH = 16
SCALING_FACTOR = 0.476986
TILES = TemporalTiles(length=5, stride=3)
"""Long clips are decoded in tiles of 17 frames that begin 12 apart, blended over 4: the default of diffusers' class.
Tencent's own code has tiles of 65 frames, 48 apart."""
_RESAMPLED: tuple[Factor, ...] = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
"""The factors of the three resamplers, in the encoder from the pixels on, in the decoder from the latents on: the first
of either changes only the size."""


def hunyuan_conv(in_width: int, out_width: int) -> ConvSpec:
    """A dense causal 3x3x3 layer that repeats a clip's first frame and the borders of frames."""
    return ConvSpec(
        operator="causal3d",
        in_width=in_width,
        out_width=out_width,
        kernel=(3, 3, 3),
        time_padding="first",
        space_padding="replicate",
    )


def _ladder(base_width: int) -> Ladder:
    return Ladder(hunyuan_conv, group_norm(base_width).model_copy(update={"over": "clip"}), context="clip")


def hunyuan_decoder_spec(base_width: int, latent_width: int = LATENT_WIDTH) -> DecoderSpec:
    """The original decoder at a base width (128: the release)."""
    widths = [base_width * m for m in reversed(MULTIPLIERS)]

    def upsampler(index: int, width: int) -> UpsampleSpec:
        return UpsampleSpec(spatial=hunyuan_conv(width, width), repeats_frames=_RESAMPLED[index][0] == 2)

    stages = _ladder(base_width).decoder_stages(latent_width, widths, upsampler)
    return DecoderSpec(
        family=NAME,
        stages=tuple(stages),
        temporal_factor=TEMPORAL_FACTOR,
        spatial_factor=SPATIAL_FACTOR,
        temporal_tiles=TILES,
    )


def hunyuan_encoder_spec(base_width: int, latent_width: int = LATENT_WIDTH) -> EncoderSpec:
    """The original encoder at a base width (128: the release)."""
    widths = [base_width * m for m in MULTIPLIERS]

    def downsampler(index: int, width: int) -> StridedDownsampleSpec:
        return StridedDownsampleSpec(conv=hunyuan_conv(width, width), factor=_RESAMPLED[index])

    stages = _ladder(base_width).encoder_stages(latent_width, widths, downsampler)
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
        "time_compression_ratio": (TEMPORAL_FACTOR,),  # Tencent's name
    },
    read=frozenset({"norm_num_groups", EACH_GROUPS, *QUANT_KEYS.values()}),
    idle=frozenset({"sample_size", "sample_tsize"}),
    latent_key="latent_channels",
    widths=dict.fromkeys(("decoder", "encoder"), (("block_out_channels", MULTIPLIERS),)),
    in_metadata=True,
    has_factors=True,
)

HUNYUAN_VIDEO = replace(
    kl_family(NAME, LATENT_WIDTH, SCALING_FACTOR, has_quant=True),
    decoder_spec=hunyuan_decoder_spec,
    encoder_spec=hunyuan_encoder_spec,
    config_keys=_CONFIG_KEYS,
    frames_per_second=24,
    elsewhere=OtherPrograms(
        repository="hunyuanvideo-community/HunyuanVideo", licence="other", comfyui=ComfyUIReader(), taehv=("taehv",)
    ),
)
