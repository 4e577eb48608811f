"""SeedVR2's VAE: Stable Diffusion's network with causal kernels in time, and frames that grow by moved channels.

4 x 8 x 8 pixels per latent of 16 channels. Norms and attention are of single frames, so it streams. Before a clip its
first frame is repeated; around frames are zeros. A diffusion model takes raw * 0.9152.

Reference: SeedVR2, arXiv 2506.05301; ByteDance-Seed/SeedVR, `models/video_vae_v3` (facts). The Flash-VAED paper has
no layout for it: stages, ratio and operators are the paper's for Wan 2.1, which has the same resolutions. The layer
after a shuffle, on the grown frames, is treated as the residual blocks before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from flashvaed_cli.decoders.spec.blocks import ConvBlockSpec, ShuffleUpsampleSpec, StridedDownsampleSpec
from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec, EncoderSpec, StageSpec
from flashvaed_cli.decoders.spec.convolutions import point_conv
from flashvaed_cli.decoders.spec.layers import ConvSpec, Factor
from flashvaed_cli.families.family import OtherPrograms
from flashvaed_cli.families.ladder import Ladder
from flashvaed_cli.families.stable_diffusion.config import MULTIPLIERS, QUANT_KEYS
from flashvaed_cli.families.stable_diffusion.config import configured as kl_configured
from flashvaed_cli.families.stable_diffusion.spec import group_norm, kl_family

SpecT = TypeVar("SpecT", bound=CoderSpec)

NAME = "seedvr2"
TEMPORAL_FACTOR, SPATIAL_FACTOR = 4, 8
LATENT_WIDTH = 16
SCALING_FACTOR = 0.9152
GROWS: tuple[Factor, ...] = ((2, 2, 2), (2, 2, 2), (1, 2, 2))
"""The factors of the decoder's resamplers, from the latents on; the encoder's are the same in reverse."""


def _conv(in_width: int, out_width: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> ConvSpec:
    """A dense causal layer that repeats a clip's first frame, with zeros around frames."""
    return ConvSpec(
        operator="causal3d",
        in_width=in_width,
        out_width=out_width,
        kernel=kernel,
        time_padding="first" if kernel[0] > 1 else "zeros",
    )


def seedvr2_decoder_spec(base_width: int, latent_width: int = LATENT_WIDTH) -> DecoderSpec:
    """The original decoder at a base width (128: the release)."""
    widths = [base_width * m for m in reversed(MULTIPLIERS)]

    def upsampler(index: int, width: int) -> ShuffleUpsampleSpec:
        factor = GROWS[index]
        conv = point_conv(width, width * factor[0] * factor[1] * factor[2])
        return ShuffleUpsampleSpec(conv=conv, factor=factor, keeps="first")

    stages = Ladder(_conv, group_norm(base_width)).decoder_stages(latent_width, widths, upsampler, has_quant=False)
    return DecoderSpec(
        family=NAME,
        stages=tuple(part for stage in stages for part in _parted(stage)),
        temporal_factor=TEMPORAL_FACTOR,
        spatial_factor=SPATIAL_FACTOR,
    )


def _parted(stage: StageSpec) -> tuple[StageSpec, ...]:
    """A stage that grows as two: its residual blocks; its shuffle, with a layer on the grown frames."""
    *blocks, last = stage.blocks
    if not isinstance(last, ShuffleUpsampleSpec):
        return (stage,)
    kernel = ConvBlockSpec(conv=_conv(last.out_width, last.out_width))
    grown = StageSpec(name=f"{stage.name}_grown", blocks=(last, kernel))
    return StageSpec(name=stage.name, blocks=tuple(blocks)), grown


def seedvr2_encoder_spec(base_width: int, latent_width: int = LATENT_WIDTH) -> EncoderSpec:
    """The original encoder at a base width (128: the release)."""
    widths = [base_width * m for m in MULTIPLIERS]

    def downsampler(index: int, width: int) -> StridedDownsampleSpec:
        factor = GROWS[-1 - index]
        conv = _conv(width, width, (3 if factor[0] > 1 else 1, 3, 3))
        return StridedDownsampleSpec(conv=conv, factor=factor, pads_after=True)

    stages = Ladder(_conv, group_norm(base_width)).encoder_stages(latent_width, widths, downsampler, has_quant=False)
    return EncoderSpec(
        family=NAME, stages=tuple(stages), temporal_factor=TEMPORAL_FACTOR, spatial_factor=SPATIAL_FACTOR
    )


def configured(spec: SpecT, config: Mapping[str, Any]) -> SpecT:
    """As that of an image VAE, but never with a 1x1 layer on the latents, for which there is no name."""
    return kl_configured(spec, {key: value for key, value in config.items() if key not in QUANT_KEYS.values()})


_KL = kl_family(NAME, LATENT_WIDTH, SCALING_FACTOR, has_quant=False)
SEEDVR2 = replace(
    _KL,
    configured=configured,  # type: ignore[arg-type]
    decoder_spec=seedvr2_decoder_spec,
    encoder_spec=seedvr2_encoder_spec,
    shallow_stages=("up2", "up2_grown", "up3"),
    paper_operators={
        **_KL.paper_operators,
        **{f"up{index}_grown": _KL.paper_operators[f"up{index}"] for index in range(len(GROWS))},
    },
    config_keys=replace(
        _KL.config_keys,
        fixed={
            **_KL.config_keys.fixed,
            "down_block_types": (("DownEncoderBlock3D",) * len(MULTIPLIERS),),
            "up_block_types": (("UpDecoderBlock3D",) * len(MULTIPLIERS),),
            "temporal_scale_num": (2,),
            "slicing_up_num": (0,),
            "time_receptive_field": ("full",),
        },
        idle=_KL.config_keys.idle | {"slicing_sample_min_size", "inflation_mode", "gradient_checkpoint"},
    ),
    native_obstacle="diffusers has no class for SeedVR2's VAE",
    frames_per_second=24,
    elsewhere=OtherPrograms(repository="ByteDance-Seed/SeedVR2-3B", licence="apache-2.0"),
)
