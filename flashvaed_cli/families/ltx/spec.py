"""LTX-Video 0.9.0, 0.9.1, 0.9.5 (also 0.9.6 to 0.9.8), LTX-2 and LTX-2.3: the originals' specs, the paper's layout.

Patches of 4x4 pixels, no attention, norms without gain. Each stage of the decoder begins with a resampler: a
convolution whose channels become frames, rows and columns. Kernels repeat the first frame of a video; released decoders
are centred in time and repeat the last frame too.

From 0.9.1 on the decoder is conditioned on a timestep, the share of noise in the latents. For a given timestep that is
a gain and a shift per channel of every norm, which the spec has for the timestep `decode_timestep`. The noise that
0.9.1 injects is left out, so that frames are the same every time, as measuring, surgery and distillation need. Its
scales are read, kept and written.

Reference: LTX-Video, arXiv 2501.00103; arXiv 2602.19161, table of the operator layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod

from flashvaed_cli.decoders.spec.blocks import (
    BlockSpec,
    ConvBlockSpec,
    HeadSpec,
    ResBlockSpec,
    ShuffleUpsampleSpec,
    StridedDownsampleSpec,
    UnshuffleDownsampleSpec,
)
from flashvaed_cli.decoders.spec.coders import DecoderSpec, EncoderSpec, StageSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec, Factor, NormSpec, SpacePadding, TimePadding
from flashvaed_cli.decoders.spec.operators import Operator
from flashvaed_cli.families.family import ComfyUIReader, Family, OtherPrograms
from flashvaed_cli.families.ltx.comfyui import comfyui_config
from flashvaed_cli.families.ltx.config import config_keys, configured, described, with_space_padding

LATENT_WIDTH = 128
PATCH = 4
TEMPORAL_FACTOR, SPATIAL_FACTOR = 8, 32
DECODE_TIMESTEP = 0.05
"""The timestep of published settings; a checkpoint's own `decode_timestep` (configuration, metadata) has precedence."""

PLAIN_NORM = NormSpec(eps=1e-8, gain=False)
CONDITIONED_NORM = NormSpec(eps=1e-8, gain=True, shift=True)


@dataclass(frozen=True)
class _UpStage:
    """Blocks after the resampler, width in base widths; `noise`: the release has scales for noise.

    `enlarges`: frames, rows and columns that the resampler makes of a position; None: there is no resampler.
    """

    num_blocks: int
    multiplier: int
    enlarges: Factor | None = (2, 2, 2)
    noise: bool = False


@dataclass(frozen=True)
class _DownStage:
    """Blocks before the resampler, width in base widths; `fold`: cells move into channels; None: a strided kernel."""

    num_blocks: int
    multiplier: int
    fold: Factor | None = None
    shrinks: bool = True


@dataclass(frozen=True)
class _Version:
    """What differs between the releases.

    `divides`: an upsampler halves the width; else a block before it does. `residual`: its input is added to its output.
    `encoder_mid_multiplier`: width of the encoder's last blocks in base widths.
    """

    name: str
    mid_blocks: int
    mid_multiplier: int
    up: tuple[_UpStage, ...]
    divides: bool
    conditioned: bool
    down: tuple[_DownStage, ...]
    encoder_mid_blocks: int
    encoder_mid_multiplier: int
    residual: bool = True
    second_class: bool = False  # LTX-2's own class in diffusers
    space_padding: SpacePadding = "zeros"


_STRIDED_ENCODER = (_DownStage(4, 1), _DownStage(3, 2), _DownStage(3, 4), _DownStage(3, 4, shrinks=False))
_FOLDING_ENCODER = (
    _DownStage(4, 1, (1, 2, 2)),
    _DownStage(6, 2, (2, 1, 1)),
    _DownStage(6, 4, (2, 2, 2)),
    _DownStage(2, 8, (2, 2, 2)),
)
V090 = _Version(
    "ltx-video-0.9.0",
    mid_blocks=4,
    mid_multiplier=4,
    up=(_UpStage(3, 4, enlarges=None), _UpStage(3, 4), _UpStage(3, 2), _UpStage(4, 1)),
    divides=False,
    residual=False,
    conditioned=False,
    down=_STRIDED_ENCODER,
    encoder_mid_blocks=4,
    encoder_mid_multiplier=4,
)
V091 = _Version(
    "ltx-video-0.9.1",
    mid_blocks=8,
    mid_multiplier=8,
    up=(_UpStage(7, 4, noise=True), _UpStage(6, 2, noise=True), _UpStage(5, 1, noise=True)),
    divides=True,
    conditioned=True,
    down=_STRIDED_ENCODER,
    encoder_mid_blocks=4,
    encoder_mid_multiplier=4,
)
V095 = _Version(
    "ltx-video-0.9.5",
    mid_blocks=5,
    mid_multiplier=8,
    up=(_UpStage(5, 4), _UpStage(5, 2), _UpStage(5, 1)),
    divides=True,
    conditioned=True,
    down=_FOLDING_ENCODER,
    encoder_mid_blocks=2,
    encoder_mid_multiplier=16,
)
# LTX-2 has the blocks of 0.9.5, not conditioned, and mirrors frames at their borders.
V2 = replace(V095, name="ltx-2", conditioned=False, second_class=True, space_padding="reflect")
V23 = _Version(
    "ltx-2.3",
    mid_blocks=2,
    mid_multiplier=8,
    up=(_UpStage(2, 4), _UpStage(4, 4), _UpStage(6, 2, (2, 1, 1)), _UpStage(4, 1, (1, 2, 2))),
    divides=True,
    residual=False,
    conditioned=False,
    down=(*_FOLDING_ENCODER[:2], _DownStage(4, 4, (2, 2, 2)), _DownStage(2, 8, (2, 2, 2))),
    encoder_mid_blocks=2,
    encoder_mid_multiplier=8,
    second_class=True,
)


def _conv(in_width: int, out_width: int, padding: TimePadding) -> ConvSpec:
    return ConvSpec(operator="causal3d", in_width=in_width, out_width=out_width, kernel=(3, 3, 3), time_padding=padding)


def _resblock(
    in_width: int, out_width: int, padding: TimePadding, norm: NormSpec = PLAIN_NORM, *, noise: bool = False
) -> ResBlockSpec:
    widens = in_width != out_width
    shortcut = ConvSpec(operator="pointwise", in_width=in_width, out_width=out_width, kernel=(1, 1, 1))
    return ResBlockSpec(
        conv1=_conv(in_width, out_width, padding),
        conv2=_conv(out_width, out_width, padding),
        shortcut=shortcut if widens else None,
        norm=norm,
        shortcut_norm=widens,
        noise=noise,
    )


def _decoder_spec(version: _Version, base_width: int, latent_width: int) -> DecoderSpec:
    """The original decoder at a base width (128: the releases)."""
    padding: TimePadding = "edges"
    norm = CONDITIONED_NORM if version.conditioned else PLAIN_NORM
    width = version.mid_multiplier * base_width
    mid = [_resblock(width, width, padding, norm) for _ in range(version.mid_blocks)]
    stages = [
        StageSpec(name="conv_in", blocks=(ConvBlockSpec(conv=_conv(latent_width, width, padding)),)),
        StageSpec(name="mid", blocks=tuple(mid)),
    ]
    for index, stage in enumerate(version.up):
        next_width = stage.multiplier * base_width
        blocks: list[BlockSpec] = []
        if width != next_width and not version.divides:
            blocks.append(_resblock(width, next_width, padding, norm, noise=stage.noise))
            width = next_width
        if stage.enlarges is not None:
            conv = _conv(width, prod(stage.enlarges) * next_width, padding)
            blocks.append(ShuffleUpsampleSpec(conv=conv, factor=stage.enlarges, residual=version.residual))
        width = next_width
        blocks += [_resblock(width, width, padding, norm, noise=stage.noise) for _ in range(stage.num_blocks)]
        stages.append(StageSpec(name=f"up{index}", blocks=tuple(blocks)))
    head = HeadSpec(conv=_conv(width, 3 * PATCH**2, padding), norm=norm)
    spec = DecoderSpec(
        family=version.name,
        stages=(*stages, StageSpec(name="head", blocks=(head,))),
        temporal_factor=TEMPORAL_FACTOR,
        spatial_factor=SPATIAL_FACTOR,
        patch=PATCH,
        decode_timestep=DECODE_TIMESTEP if version.conditioned else None,
    )
    return with_space_padding(spec, version.space_padding)


def _encoder_spec(version: _Version, base_width: int, latent_width: int) -> EncoderSpec:
    """The original encoder at a base width (128: the releases)."""
    width = base_width * version.down[0].multiplier
    stages = [StageSpec(name="conv_in", blocks=(ConvBlockSpec(conv=_conv(3 * PATCH**2, width, "first")),))]
    following = (*(stage.multiplier for stage in version.down[1:]), version.encoder_mid_multiplier)
    for index, (stage, multiplier) in enumerate(zip(version.down, following, strict=True)):
        next_width = multiplier * base_width
        blocks: list[BlockSpec] = [_resblock(width, width, "first") for _ in range(stage.num_blocks)]
        if stage.fold is not None:
            conv = _conv(width, next_width // prod(stage.fold), "first")
            blocks.append(UnshuffleDownsampleSpec(conv=conv, factor=stage.fold))
        elif stage.shrinks:
            blocks.append(StridedDownsampleSpec(conv=_conv(width, width, "first")))
            blocks += [_resblock(width, next_width, "first")] if next_width != width else []
        stages.append(StageSpec(name=f"down{index}", blocks=tuple(blocks)))
        width = next_width
    mid = tuple(_resblock(width, width, "first") for _ in range(version.encoder_mid_blocks))
    head = HeadSpec(conv=_conv(width, latent_width + 1, "first"), norm=PLAIN_NORM)
    return EncoderSpec(
        family=version.name,
        stages=(*stages, StageSpec(name="mid", blocks=mid), StageSpec(name="head", blocks=(head,))),
        temporal_factor=TEMPORAL_FACTOR,
        spatial_factor=SPATIAL_FACTOR,
        patch=PATCH,
        shared_variance=True,
    )


def _listed_widths(version: _Version) -> dict[str, tuple[int, ...]]:
    """The multiples of the base width that diffusers' configurations list."""
    up = [stage.multiplier for stage in version.up]
    if version.divides:  # the width before an upsampler is listed
        up = [version.mid_multiplier, *up[:-1]]
    down = tuple(stage.multiplier for stage in version.down)
    if version.down[-1].fold is not None:
        down = (*down, version.encoder_mid_multiplier)
    return {"decoder": tuple(reversed(up)), "encoder": down[1:] if version.second_class else down}


def _family(version: _Version, operators: Mapping[str, Operator], shallow_stages: tuple[str, ...]) -> Family:
    return Family(
        name=version.name,
        decoder_spec=partial(_decoder_spec, version),
        encoder_spec=partial(_encoder_spec, version),
        latent_width=LATENT_WIDTH,
        latent_mean=(),  # the files have their own
        latent_std=(),
        released_base_width=128,
        shallow_stages=shallow_stages,
        paper_keep_ratio=0.25,
        paper_operators=operators,
        frames_per_second=24,
        config_keys=config_keys(
            _decoder_spec(version, 8, LATENT_WIDTH),
            _encoder_spec(version, 8, LATENT_WIDTH),
            _listed_widths(version),
            entry_is_latent=version.second_class,
        ),
        configured=configured,  # type: ignore[arg-type]
        described=described,
        elsewhere=_elsewhere(version),
    )


def _elsewhere(version: _Version) -> OtherPrograms:
    return OtherPrograms(
        repository={V2.name: "Lightricks/LTX-2", V23.name: "Lightricks/LTX-2.3"}.get(
            version.name, "Lightricks/LTX-Video"
        ),
        licence="other",
        reads_single_file=version is not V23,  # the converter only knows LTX-2's blocks
        tells_by_released_encoder=version is V095,  # told from 0.9.1 by the encoder's last width
        comfyui=None if version.second_class else ComfyUIReader(config=comfyui_config),
        taehv={V2.name: ("taeltx_2",), V23.name: ("taeltx2_3",)}.get(version.name, ()),
    )


# The paper's table is for 0.9.0, which has four up stages; later versions take it from the end.
LTX_090 = _family(V090, {"mid": "dwsep3d", "up0": "dwsep3d", "up1": "dwsep3d", "up3": "frame2d"}, ("up2", "up3"))
LTX_091 = _family(V091, {"mid": "dwsep3d", "up0": "dwsep3d", "up2": "frame2d"}, ("up1", "up2"))
LTX_095 = _family(V095, {"mid": "dwsep3d", "up0": "dwsep3d", "up2": "frame2d"}, ("up1", "up2"))
LTX_2 = _family(V2, {"mid": "dwsep3d", "up0": "dwsep3d", "up2": "frame2d"}, ("up1", "up2"))
LTX_23 = _family(V23, {"mid": "dwsep3d", "up0": "dwsep3d", "up1": "dwsep3d", "up3": "frame2d"}, ("up2", "up3"))

LTX_VIDEO = (LTX_090, LTX_091, LTX_095)
LTX_2_CLASS = (LTX_2, LTX_23)
"""The versions with a separate class in diffusers."""
