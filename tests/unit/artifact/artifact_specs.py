"""Small decoders, and the shapes of the released student, for the tests of the artifact room."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.decoders.modules.coder import Coder, Decoder
from flashvaed_cli.decoders.spec.blocks import BlockSpec, ResBlockSpec, UpsampleSpec
from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec
from flashvaed_cli.decoders.variants.still import still_spec
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.families.wan21.spec import LATENT_MEAN, LATENT_STD, NAME, wan_decoder_spec, wan_encoder_spec
from flashvaed_cli.families.wan22.spec import WAN22
from flashvaed_cli.surgery.respec import converted_spec, narrowed_spec
from tests.toy import kept_of

DECODER_SPEC = wan_decoder_spec(4)
ENCODER_SPEC = wan_encoder_spec(4)


def conv(operator: str, in_width: int, out_width: int) -> ConvSpec:
    kernel = {"pointwise": (1, 1, 1), "frame2d": (1, 3, 3)}.get(operator, (3, 3, 3))
    return ConvSpec(operator=operator, in_width=in_width, out_width=out_width, kernel=kernel)  # type: ignore[arg-type]


def resblock(operator: str, in_width: int, inner_width: int, out_width: int, *, shortcut: bool) -> ResBlockSpec:
    return ResBlockSpec(
        conv1=conv(operator, in_width, inner_width),
        conv2=conv(operator, inner_width, out_width),
        shortcut=conv("pointwise", in_width, out_width) if shortcut else None,
    )


def flash_spec() -> DecoderSpec:
    """Converted and pruned: deep stages separable, shallow ones 2D, all widths of the last stages different."""
    wide = 4 * 4
    changed: dict[str, BlockSpec] = {
        "mid.0": resblock("dwsep3d", wide, wide, wide, shortcut=False),
        "up0.1": resblock("dwsep3d", wide, 7, wide, shortcut=False),
        "up1.0": resblock("dwsep3d", wide // 2, 5, wide, shortcut=True),
        "up1.3": UpsampleSpec(
            temporal=ConvSpec(operator="causal3d", in_width=wide, out_width=2 * wide, kernel=(3, 1, 1)),
            spatial=conv("frame2d", wide, 6),
        ),
        "up2.0": resblock("frame2d", 6, 3, 6, shortcut=True),
        "up2.1": resblock("causal3d", 6, 5, 6, shortcut=False),
        "up2.2": resblock("frame2d", 6, 2, 6, shortcut=False),
        "up2.3": UpsampleSpec(spatial=conv("frame2d", 6, 3)),
        **{f"up3.{i}": resblock("frame2d", 3, i + 1, 3, shortcut=True) for i in range(3)},
        "head.0": DECODER_SPEC.stage("head").blocks[0].model_copy(update={"conv": conv("causal3d", 3, 3)}),
    }
    return DECODER_SPEC.with_blocks(changed)


def specs_of(family: str) -> dict[str, CoderSpec]:
    """The original's decoder and encoder of a family at width 4, and a converted and pruned decoder."""
    of = get_family(family)
    decoder = of.decoder_spec(4, of.latent_width)
    flash = converted_spec(narrowed_spec(decoder, kept_of(decoder, of.shallow_stages)), of.paper_operators)
    if family != WAN22.name:
        flash = flash_spec().model_copy(update={"family": family})
    return {
        "original": decoder,
        "encoder": of.encoder_spec(4, of.latent_width),
        "flash": flash,
        "still": still_spec(decoder),
    }


def filled(coder: Coder) -> Coder:
    """Every parameter is random, gains and biases too, so that a swap of two shows."""
    with torch.no_grad():
        for parameter in coder.parameters():
            nn.init.normal_(parameter, std=0.3)
    return coder.eval().requires_grad_(False)


def small_decoder(spec: DecoderSpec = DECODER_SPEC) -> Decoder:
    decoder = Decoder(spec)
    filled(decoder)
    return decoder


def header(**settings: object) -> ArtifactHeader:
    given = {"kind": "decoder", "family": NAME, "latent_mean": LATENT_MEAN, "latent_std": LATENT_STD, **settings}
    return ArtifactHeader(**given)  # type: ignore[arg-type]


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def released_shapes(wide: int = 384, up2: int = 24, up3: int = 12) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the released `Flash_VAED_Wan.pth`, at its widths or smaller ones."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add(place: str, *shape: int) -> None:
        shapes[f"{place}.weight"] = shape
        shapes[f"{place}.bias"] = shape[:1]

    def add_separable(place: str, in_width: int, out_width: int, kernel: int) -> None:
        add(f"{place}.depthwise_conv", in_width, 1, kernel, kernel, kernel)
        add(f"{place}.pointwise_conv", out_width, in_width, 1, 1, 1)

    def add_separable_block(place: str, in_width: int, out_width: int) -> None:
        for norm, layer, width in (("0", "2", in_width), ("3", "6", out_width)):
            shapes[f"{place}.residual.{norm}.gamma"] = (width, 1, 1, 1)
            add_separable(f"{place}.residual.{layer}", width, out_width, 3)
        if in_width != out_width:
            add_separable(f"{place}.shortcut", in_width, out_width, 1)

    def add_frame_block(place: str, width: int) -> None:
        for norm, layer in (("0", "2"), ("3", "6")):
            shapes[f"{place}.residual.{norm}.gamma"] = (width, 1, 1)
            add(f"{place}.residual.{layer}", width, width, 3, 3)
        add(f"{place}.shortcut", width, width, 1, 1)

    add("conv1", 32, 32, 1, 1, 1)
    add("conv2", 16, 16, 1, 1, 1)
    add("decoder.conv1", wide, 16, 3, 3, 3)
    for index in (0, 2):
        add_separable_block(f"decoder.middle.{index}", wide, wide)
    shapes["decoder.middle.1.norm.gamma"] = (wide, 1, 1)
    add("decoder.middle.1.to_qkv", 3 * wide, wide, 1, 1)
    add("decoder.middle.1.proj", wide, wide, 1, 1)
    for index in (0, 1, 2, 4, 5, 6):
        add_separable_block(f"decoder.upsamples.{index}", wide // 2 if index == 4 else wide, wide)
    for index, out_width in ((3, wide // 2), (7, up2)):
        add(f"decoder.upsamples.{index}.resample.1", out_width, wide, 3, 3)
        add(f"decoder.upsamples.{index}.time_conv", 2 * wide, wide, 3, 1, 1)
    add("decoder.upsamples.11.resample.1", up3, up2, 3, 3)
    for start, width in ((8, up2), (12, up3)):
        for index in range(start, start + 3):
            add_frame_block(f"decoder.upsamples.{index}", width)
    shapes["decoder.head.0.gamma"] = (up3, 1, 1, 1)
    add("decoder.head.2", 3, up3, 3, 3, 3)
    return shapes
