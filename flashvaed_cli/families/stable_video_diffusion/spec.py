"""Stable Video Diffusion's VAE: Stable Diffusion's encoder, and a decoder that sees the frames around each frame.

After every residual block on frames comes one in time: GroupNorm over the whole clip, kernels of three frames with
zeros before the first and after the last. The original scales such a block's residual by a learned share; here the
share is part of the block's second layer, which is the same function. Frames depend on how many are decoded at once, so
that number is part of the definition: see `CLIP_LENGTH`.

A clip of T latents gives T frames. A diffusion model takes raw * 0.18215, so the deviation is 1 / 0.18215.

Reference: Stable Video Diffusion, arXiv 2311.15127; diffusers `AutoencoderKLTemporalDecoder`. The Flash-VAED paper has
no layout for it: stages and ratio are the paper's for Wan 2.1; in up2 and up3 the layers in time become pointwise, as
2D layers do not see other frames.
"""

from __future__ import annotations

from dataclasses import replace

from flashvaed_cli.decoders.spec.blocks import ConvBlockSpec, ResBlockSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec, StageSpec, TemporalTiles
from flashvaed_cli.decoders.spec.convolutions import frame_conv
from flashvaed_cli.decoders.spec.layers import ConvSpec
from flashvaed_cli.families.family import ComfyUIReader, OtherPrograms
from flashvaed_cli.families.ladder import Ladder
from flashvaed_cli.families.stable_diffusion.config import CONFIG_KEYS, MULTIPLIERS
from flashvaed_cli.families.stable_diffusion.spec import SPATIAL_FACTOR, frame_upsampler, group_norm, kl_family

NAME = "stable-video-diffusion"
LATENT_WIDTH = 4
SCALING_FACTOR = 0.18215
TEMPORAL_EPS = 1e-5
CLIP_LENGTH = 25
"""Frames that are decoded at once; longer clips come in runs of so many. diffusers' pipeline decodes all frames at once
unless `decode_chunk_size` says otherwise, so the clips of the released models, 14 and 25 frames, decode as there."""


def _time_conv(in_width: int, out_width: int) -> ConvSpec:
    return ConvSpec(
        operator="causal3d", in_width=in_width, out_width=out_width, kernel=(3, 1, 1), time_padding="zeros_around"
    )


def svd_decoder_spec(base_width: int, latent_width: int = LATENT_WIDTH) -> DecoderSpec:
    """The original decoder at a base width (128: the release)."""
    norm = group_norm(base_width)
    over_clip = norm.model_copy(update={"eps": TEMPORAL_EPS, "over": "clip"})

    def in_time(width: int) -> ResBlockSpec:
        return ResBlockSpec(conv1=_time_conv(width, width), conv2=_time_conv(width, width), norm=over_clip)

    ladder, widths = Ladder(frame_conv, norm, follower=in_time), [base_width * m for m in reversed(MULTIPLIERS)]
    stages = ladder.decoder_stages(latent_width, widths, frame_upsampler, has_quant=False)
    stages.append(StageSpec(name="time_out", blocks=(ConvBlockSpec(conv=_time_conv(3, 3)),)))
    return DecoderSpec(
        family=NAME,
        stages=tuple(stages),
        temporal_factor=1,
        spatial_factor=SPATIAL_FACTOR,
        temporal_tiles=TemporalTiles(length=CLIP_LENGTH, stride=CLIP_LENGTH),
    )


STABLE_VIDEO_DIFFUSION = replace(
    kl_family(NAME, LATENT_WIDTH, SCALING_FACTOR, has_quant=True),
    decoder_spec=svd_decoder_spec,
    config_keys=CONFIG_KEYS,
    native_obstacle=(
        "its stock class has one block_out_channels for encoder and decoder, and 32 groups in every norm, so no "
        "separate ones for the decoder"
    ),
    frames_per_second=7,
    elsewhere=OtherPrograms(
        repository="stabilityai/stable-video-diffusion-img2vid-xt",
        licence="other",
        comfyui=ComfyUIReader(has_node=False),
    ),
)
