"""Stable Video Diffusion's VAE: Stable Diffusion's encoder, and a decoder that looks at the frames around each.

After every residual block on frames comes one in time: GroupNorm over the whole clip, kernels of three frames with
zeros before the first and after the last. The original takes a learned share of what such a block adds; that is part of
its second layer here, which is the same function. Frames depend on how many are decoded at once, so that number belongs
to the definition: see `CLIP_LENGTH`.

A clip of T latents gives T frames. A diffusion model takes raw * 0.18215, so the deviation is its inverse.

Reference: Stable Video Diffusion, arXiv 2311.15127; diffusers `AutoencoderKLTemporalDecoder`. The paper of Flash-VAED
has no layout for it: stages and ratio are those that it gives Wan 2.1; in up2 and up3 what works in time becomes
pointwise, as 2D layers do not look at other frames.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from flashvaed_cli.decoders.spec.blocks import (
    AttentionSpec,
    BlockSpec,
    ConvBlockSpec,
    HeadSpec,
    ResBlockSpec,
    UpsampleSpec,
)
from flashvaed_cli.decoders.spec.coders import DecoderSpec, StageSpec, TemporalTiles
from flashvaed_cli.decoders.spec.layers import ConvSpec, NormSpec
from flashvaed_cli.families.family import ComfyUIReader, Family, OtherPrograms
from flashvaed_cli.families.stable_diffusion.config import CONFIG_KEYS, MULTIPLIERS, configured, described
from flashvaed_cli.families.stable_diffusion.spec import (
    BASE_WIDTH,
    SPATIAL_FACTOR,
    frame_resblock,
    group_norm,
    kl_encoder_spec,
)
from flashvaed_cli.families.wan21.spec import frame_conv

NAME = "stable-video-diffusion"
LATENT_WIDTH = 4
SCALING_FACTOR = 0.18215
TEMPORAL_EPS = 1e-5
CLIP_LENGTH = 25
"""Frames that are decoded at once, longer clips in runs of so many. diffusers' pipeline decodes all frames at once,
unless its `decode_chunk_size` says otherwise; the released models make 14 and 25, which come out as there."""


def _time_conv(in_width: int, out_width: int) -> ConvSpec:
    return ConvSpec(
        operator="causal3d", in_width=in_width, out_width=out_width, kernel=(3, 1, 1), time_padding="zeros_around"
    )


def _time_resblock(width: int, norm: NormSpec) -> ResBlockSpec:
    over_clip = norm.model_copy(update={"eps": TEMPORAL_EPS, "over": "clip"})
    return ResBlockSpec(conv1=_time_conv(width, width), conv2=_time_conv(width, width), norm=over_clip)


def _resblocks(in_width: int, width: int, norm: NormSpec) -> tuple[ResBlockSpec, ResBlockSpec]:
    """On frames, then in time."""
    return frame_resblock(in_width, width, norm), _time_resblock(width, norm)


def svd_decoder_spec(base_width: int, latent_width: int = LATENT_WIDTH) -> DecoderSpec:
    """The original decoder at a base width (128: the release)."""
    norm = group_norm(base_width)
    widths = [base_width * m for m in (MULTIPLIERS[-1], *reversed(MULTIPLIERS))]
    middle = _resblocks(widths[0], widths[0], norm)
    attention = AttentionSpec(width=widths[0], inner_width=widths[0], norm=norm)
    stages = [
        StageSpec(name="conv_in", blocks=(ConvBlockSpec(conv=frame_conv(latent_width, widths[0])),)),
        StageSpec(name="mid", blocks=(*middle, attention, *middle)),
    ]
    for i, (in_width, width) in enumerate(pairwise(widths)):
        blocks: list[BlockSpec] = [block for w in (in_width, width, width) for block in _resblocks(w, width, norm)]
        if i < len(MULTIPLIERS) - 1:
            blocks.append(UpsampleSpec(spatial=frame_conv(width, width)))
        stages.append(StageSpec(name=f"up{i}", blocks=tuple(blocks)))
    stages.append(StageSpec(name="head", blocks=(HeadSpec(conv=frame_conv(widths[-1], 3), norm=norm),)))
    stages.append(StageSpec(name="time_out", blocks=(ConvBlockSpec(conv=_time_conv(3, 3)),)))
    return DecoderSpec(
        family=NAME,
        stages=tuple(stages),
        temporal_factor=1,
        spatial_factor=SPATIAL_FACTOR,
        temporal_tiles=TemporalTiles(length=CLIP_LENGTH, stride=CLIP_LENGTH),
    )


STABLE_VIDEO_DIFFUSION = Family(
    name=NAME,
    decoder_spec=svd_decoder_spec,
    encoder_spec=partial(kl_encoder_spec, NAME, True),
    latent_width=LATENT_WIDTH,
    latent_mean=(0.0,) * LATENT_WIDTH,
    latent_std=(1 / SCALING_FACTOR,) * LATENT_WIDTH,
    released_base_width=BASE_WIDTH,
    shallow_stages=("up2", "up3"),
    paper_keep_ratio=0.125,
    paper_operators={"mid": "dwsep3d", "up0": "dwsep3d", "up1": "dwsep3d", "up2": "frame2d", "up3": "frame2d"},
    config_keys=CONFIG_KEYS,
    configured=configured,  # type: ignore[arg-type]
    described=described,
    native_obstacle=(
        "its stock class has one block_out_channels for encoder and decoder, and 32 groups in every norm, so none of "
        "the decoder's own"
    ),
    frames_per_second=7,
    elsewhere=OtherPrograms(
        repository="stabilityai/stable-video-diffusion-img2vid-xt",
        licence="other",
        comfyui=ComfyUIReader(has_node=False),
    ),
)
