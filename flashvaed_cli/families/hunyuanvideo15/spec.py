"""HunyuanVideo 1.5's VAE: RMS norms, and resamplers that move channels and add copies of their input.

4 x 16 x 16 pixels per latent of 32 channels. A diffusion model takes raw * 1.03682. Layers repeat frame borders as
HunyuanVideo's do, attention sees all earlier frames, and the latents are copied past the decoder's first layer as the
encoder's widest channels are averaged past its last.

Reference: diffusers `AutoencoderKLHunyuanVideo15` (facts only). The Flash-VAED paper has no layout for it: stages,
ratio and operators are the paper's for Wan 2.1, by resolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar, cast

from flashvaed_cli.decoders.spec.blocks import BlockSpec, CellDownsampleSpec, CellUpsampleSpec
from flashvaed_cli.decoders.spec.coders import BypassSpec, CoderSpec, DecoderSpec, EncoderSpec, StageSpec
from flashvaed_cli.decoders.spec.convolutions import point_conv
from flashvaed_cli.decoders.spec.layers import Factor
from flashvaed_cli.errors import SpecError
from flashvaed_cli.families.family import ComfyUIReader, ConfigKeys, OtherPrograms
from flashvaed_cli.families.hunyuanvideo.spec import HUNYUAN_VIDEO, hunyuan_conv
from flashvaed_cli.families.ladder import Ladder

SpecT = TypeVar("SpecT", bound=CoderSpec)

NAME = "hunyuanvideo-1.5"
MULTIPLIERS = (1, 2, 4, 8, 8)
TEMPORAL_FACTOR, SPATIAL_FACTOR = 4, 16
LATENT_WIDTH = 32
SCALING_FACTOR = 1.03682
GROWS: tuple[Factor, ...] = ((2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2))
"""The factors of the decoder's resamplers, from the latents on; the encoder's are the same in reverse."""
RESIDUALS = "decoder_upsample_residual"
"""Our own key, for decoders with resamplers whose copies pruning has put into their layers: a flag for each, from the
latents on."""
_LADDER = Ladder(hunyuan_conv, context="clip")


def hunyuan15_decoder_spec(base_width: int, latent_width: int = LATENT_WIDTH) -> DecoderSpec:
    """The original decoder at a base width (128: the release)."""
    widths = [base_width * m for m in reversed(MULTIPLIERS)]

    def upsampler(index: int, width: int) -> CellUpsampleSpec:
        factor = GROWS[index]
        wide = widths[index + 1] * factor[0] * factor[1] * factor[2]
        return CellUpsampleSpec(conv=hunyuan_conv(width, wide), factor=factor)

    stages = _LADDER.decoder_stages(latent_width, widths, upsampler, has_quant=False)
    return DecoderSpec(
        family=NAME,
        stages=(_passed(stages[0], "duplicate"), *stages[1:]),
        temporal_factor=TEMPORAL_FACTOR,
        spatial_factor=SPATIAL_FACTOR,
    )


def hunyuan15_encoder_spec(base_width: int, latent_width: int = LATENT_WIDTH) -> EncoderSpec:
    """The original encoder at a base width (128: the release)."""
    widths = [base_width * m for m in MULTIPLIERS]

    def downsampler(index: int, width: int) -> CellDownsampleSpec:
        factor = GROWS[-1 - index]
        narrow = widths[index + 1] // (factor[0] * factor[1] * factor[2])
        return CellDownsampleSpec(conv=hunyuan_conv(width, narrow), factor=factor)

    stages = _LADDER.encoder_stages(latent_width, widths, downsampler, has_quant=False)
    return EncoderSpec(
        family=NAME,
        stages=(*stages[:-1], _passed(stages[-1], "average")),
        temporal_factor=TEMPORAL_FACTOR,
        spatial_factor=SPATIAL_FACTOR,
    )


def _passed(stage: StageSpec, kind: Literal["duplicate", "average"]) -> StageSpec:
    """The stage with a bypass around it."""
    ends = stage.blocks[0].in_width, stage.blocks[-1].out_width
    bypass = BypassSpec(kind=kind, in_width=ends[0], out_width=ends[1])
    return StageSpec(name=stage.name, blocks=stage.blocks, bypass=bypass)


def described(spec: CoderSpec) -> dict[str, Any]:
    """The configuration for which `configured` restores what shapes do not show; empty for originals."""
    flags = [block.residual for _, block in spec.blocks() if isinstance(block, CellUpsampleSpec)]
    return {} if all(flags) else {RESIDUALS: flags}


def configured(spec: SpecT, config: Mapping[str, Any]) -> SpecT:
    """The spec with the resamplers of a pruned decoder.

    Raises:
        SpecError: `decoder_upsample_residual` is not a flag for each resampler.
    """
    flags = config.get(RESIDUALS)
    if flags is None or not isinstance(spec, DecoderSpec):
        return spec
    found = {address: block for address, block in spec.blocks() if isinstance(block, CellUpsampleSpec)}
    if not isinstance(flags, list | tuple) or [type(flag) for flag in flags] != [bool] * len(found):
        raise SpecError(f"{RESIDUALS} is {flags!r:.80}; supported: {len(found)} of true or false")
    changed: dict[str, BlockSpec] = {}
    for (address, block), flag in zip(found.items(), flags, strict=True):
        conv, ft = block.conv, block.factor[0]
        first = None if flag or ft == 1 else point_conv(conv.in_width, conv.out_width // ft)
        changed[address] = CellUpsampleSpec(conv=conv, factor=block.factor, residual=flag, first=first)
    return cast(SpecT, spec.with_blocks(changed))


_CONFIG_KEYS = ConfigKeys(
    fixed={
        "in_channels": (3,),
        "out_channels": (3,),
        "layers_per_block": (2,),
        "spatial_compression_ratio": (SPATIAL_FACTOR,),
        "temporal_compression_ratio": (TEMPORAL_FACTOR,),
        "ffactor_spatial": (SPATIAL_FACTOR,),  # Tencent's names
        "ffactor_temporal": (TEMPORAL_FACTOR,),
        "downsample_match_channel": (True,),
        "upsample_match_channel": (True,),
    },
    read=frozenset({"shift_factor", RESIDUALS}),
    idle=frozenset({"sample_size", "sample_tsize"}),
    latent_key="latent_channels",
    widths=dict.fromkeys(("decoder", "encoder"), (("block_out_channels", MULTIPLIERS),)),
    in_metadata=True,
    has_factors=True,
)

HUNYUAN_VIDEO_15 = replace(
    HUNYUAN_VIDEO,
    name=NAME,
    decoder_spec=hunyuan15_decoder_spec,
    encoder_spec=hunyuan15_encoder_spec,
    latent_width=LATENT_WIDTH,
    latent_mean=(0.0,) * LATENT_WIDTH,
    latent_std=(1 / SCALING_FACTOR,) * LATENT_WIDTH,
    shallow_stages=("up3", "up4"),
    paper_operators={
        **dict.fromkeys(("mid", "up0", "up1", "up2"), "dwsep3d"),
        **dict.fromkeys(("up3", "up4"), "frame2d"),
    },
    config_keys=_CONFIG_KEYS,
    configured=configured,  # type: ignore[arg-type]
    described=described,
    native_obstacle=(
        "its stock class has one block_out_channels for encoder and decoder, so no separate ones for the decoder"
    ),
    elsewhere=OtherPrograms(
        repository="hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v",
        licence="other",
        comfyui=ComfyUIReader(),
        taehv=("taehv1_5", "taehv1_5_super"),
    ),
)
