"""A video decoder as one for single images: the same pixels for T = 1, by layers on frames alone.

Before and after the only frame of a video a kernel reads zeros (or that frame again), and temporal upsamplers skip it.
So only one temporal tap of each kernel counts (or the sum of all taps), and no layer works in time any more.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.modules.bypass import Bypass
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.modules.operators import Conv
from flashvaed_cli.decoders.spec.blocks import AttentionSpec, BlockSpec, UpsampleSpec
from flashvaed_cli.decoders.spec.coders import BypassSpec, DecoderSpec, StageSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec, NormSpec
from flashvaed_cli.errors import SpecError


@torch.no_grad()
def still_decoder(decoder: Decoder) -> Decoder:
    """The decoder of single images that gives the pixels of `decoder` for one latent frame.

    Args:
        decoder: with plain operators.
    Raises:
        SpecError: it is one already, or has a block without a form for single images.
    """
    spec = decoder.spec
    if spec.still:
        raise SpecError("this decoder is one of single images already")
    if all(layer.kernel[0] == 1 for _, layer in spec.layers()) and spec.temporal_factor == 1:
        raise SpecError(
            f"no profile of single images for {spec.family}: it decodes every frame by itself already, an image as a "
            "clip of one. Leave --profile image out"
        )
    if unknown := {address: block for address, block in spec.blocks() if not block.has_still_form}:
        growing = {address: block for address, block in unknown.items() if block.growth[0] > 1}
        first = next(f"{address} ({block.kind})" for address, block in (growing or unknown).items())
        raise SpecError(f"no profile of single images for {spec.family}: {first} works in time too")
    if any(isinstance(block, UpsampleSpec) and block.grows_first for _, block in spec.blocks()):
        raise SpecError(
            "no profile of single images for a decoder that drops lead frames: its first frame has seen those before it"
        )
    bypasses = {stage: _still_bypass(decoder.bypass_of(stage)) for stage in decoder.bypasses}
    still = Decoder(still_spec(spec, bypasses)).to(next(decoder.parameters()))
    still.eval().requires_grad_(False)
    for name, parameter in still.named_parameters():
        module, _, key = name.rpartition(".")
        if module.startswith("bypasses."):
            continue
        layer = decoder.get_submodule(module)
        source = layer.get_parameter(key)
        if isinstance(layer, Conv) and key != "bias":
            source = _at_first_frame(layer.spec, key, source)
        parameter.copy_(source.reshape(parameter.shape))
    for stage, bypass in still.bypasses.items():
        assert isinstance(bypass, Bypass)
        if bypass.conv is not None:
            weight, bias = _first_frame_matrix(decoder.bypass_of(stage))
            bypass.conv.weight.copy_(weight)
            bypass.conv.bias.copy_(bias)
    return still


def _at_first_frame(layer: ConvSpec, key: str, kernel: Tensor) -> Tensor:
    """The kernel that the first frame of a video sees: of five axes, with one temporal tap."""
    has_time = kernel.ndim == 5 and not (layer.operator == "dwsep3d" and key == "weight")
    if not has_time or kernel.shape[2] == 1:
        return kernel
    if layer.time_padding in ("zeros", "zeros_around"):
        return kernel[:, :, layer.num_past : layer.num_past + 1]
    return kernel.sum(2, keepdim=True)


def still_spec(spec: DecoderSpec, bypasses: Mapping[str, BypassSpec] | None = None) -> DecoderSpec:
    """The spec without time.

    Args:
        bypasses: by stage; a bypass that is not among them becomes plain copies.
    """
    stages = []
    for stage in spec.stages:
        bypass = None if stage.bypass is None else (bypasses or {}).get(stage.name, _plain_copies(stage.bypass))
        stages.append(StageSpec(name=stage.name, blocks=tuple(map(_still_block, stage.blocks)), bypass=bypass))
    return DecoderSpec(**{**dict(spec), "stages": tuple(stages), "still": True, "temporal_tiles": None})


def _still_block(block: BlockSpec) -> BlockSpec:
    norms = {
        name: norm.model_copy(update={"over": "frame"})
        for name in type(block).model_fields
        if isinstance(norm := getattr(block, name), NormSpec)
    }
    if isinstance(block, AttentionSpec):
        return block.model_copy(update={**norms, "context": "frame"})
    layers = {name: _still_layer(layer) for name, layer in block.layers.items() if name != "temporal"}
    if isinstance(block, UpsampleSpec):
        return UpsampleSpec(spatial=layers["spatial"])
    return block.model_copy(update={**norms, **layers})


def _still_layer(layer: ConvSpec) -> ConvSpec:
    operator = "frame2d" if layer.operator == "causal3d" else layer.operator
    operator = "pointwise" if operator == "frame2d" and layer.kernel[1:] == (1, 1) else operator
    return ConvSpec(
        operator=operator,
        in_width=layer.in_width,
        out_width=layer.out_width,
        kernel=(1, *layer.kernel[1:]),
        space_padding=layer.space_padding,
    )


def _plain_copies(bypass: BypassSpec) -> BypassSpec:
    return bypass.model_copy(update={"temporal_factor": 1, "conv": None})


def _still_bypass(bypass: Bypass) -> BypassSpec:
    """Plain copies if the first frame's are, else a layer."""
    spec = bypass.spec
    copies = _plain_copies(spec)
    if bypass.conv is None and torch.equal(Bypass(copies, "").matrix()[0], _first_frame_matrix(bypass)[0]):
        return copies
    return copies.narrowed(spec.in_width, spec.out_width)


def _first_frame_matrix(bypass: Bypass) -> tuple[Float[Tensor, "Cw C"], Float[Tensor, " Cw"]]:
    """The wide channels of a video's first frame, which is the last of its cell."""
    spec = bypass.spec
    cells = (spec.out_width, spec.temporal_factor, spec.spatial_factor**2)
    weight, bias = bypass.matrix()
    return weight.unflatten(0, cells)[:, -1].flatten(0, 1), bias.unflatten(0, cells)[:, -1].flatten()
