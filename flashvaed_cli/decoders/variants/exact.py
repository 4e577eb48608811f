"""The same network with its fastest exact operators, and back.

The choice of twins was measured on a CPU (one core with AVX-512, torch 2.15, channels-last, 5 or 9 frames of 16 to 256
pixels; milliseconds of the plain operator / the twin, float32 and bfloat16):

    layer                          twin          float32      bfloat16
    causal3d 3x3x3, 384 to 384     tapwise3d     see below     43 / 36
    causal3d 3x3x3, 96 to 96       tapwise3d     see below     80 / 73
    causal3d 3x3x3, 16 to 384      tapwise3d     4.7 / 3.5    2.0 / 2.1
    causal3d 3x1x1, 384 to 768     tapwise3d      93 / 57      33 / 27
    causal3d 3x3x3, 96 to 3        stacked3d     153 / 40      86 / 27
    causal3d 3x3x3, 12 to 3        stacked3d     178 / 6      7.6 / 3.9
    upsampler's frame2d, 192 to 96 subpixel2d    109 / 54      55 / 30
    upsampler's frame2d, 24 to 12  subpixel2d     11 / 5.5    6.2 / 3.1

causal3d 3x3x3 in float32, two cores of an AMD EPYC with AVX-512, torch 2.14, milliseconds; winograd3d calls tapwise3d
where `predict.winograd_strips` expects that to be faster:

    layer, frames                  plain    tapwise3d    winograd3d
    384 to 384, 3 of 32x32            51           34            31
    384 to 384, 5 of 64x64           384          256           169
    192 to 192, 9 of 128x128         649          573           329
    96 to 96, 9 of 256x256           708          691           445
    67 to 67, 9 of 256x256           460          421           314
    48 to 48, 9 of 256x256           206          189           169
    24 to 24, 9 of 256x256            85           70            72
    96 to 96, 1 of 64x64, a past      30            4             6
    1024 to 1024, 4 of 16x16         147          100           134

An upsampler with a temporal layer that gives few channels runs both layers as one kernel then (384 to 24, two cores,
float32: 221 / 82 ms; `modules/narrow_upsampler.py`).

For LTX (3x3x3, 2 to 17 frames of 8 to 64 pixels, one core of an AMD EPYC with AVX-512; processor time of the plain
operator over that of the twin; edge frames repeated, zeros / mirrored around the frames; 1.2 to 2.4 with the first
frame repeated or a past):

    layer                          twin          float32      bfloat16
    1024 to 1024, 2 of 8x8         one product   1.7 / 1.8    2.1 / 2.2
    512 to 4096, 4 of 8x8          one product   1.4 / 1.2    1.3 / 1.5

winograd3d falls back to tapwise3d for half precision too; for frames with their margins in time,
tapwise3d uses one product of patches (few positions, wide kernel) or the plain form (other wide kernels, half
precision). No twin of dwsep3d, pointwise or a residual block's frame2d was faster than the plain operator. Nothing was
measured on CUDA: only the upsamplers change there, which saves products and memory on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch

from flashvaed_cli.decoders.modules.coder import Coder, Decoder
from flashvaed_cli.decoders.spec.blocks import BlockSpec, UpsampleSpec
from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec
from flashvaed_cli.decoders.spec.operators import Operator

WINOGRAD_WIDTH = 24
"""Channels on either side from which the products outweigh the transforms (16: 5.3 ms against 4.8)."""

STACKED_WIDTH = 4
"""Outputs up to which `stacked3d` saves more reading than it adds writing."""

CoderT = TypeVar("CoderT", bound=Coder)
SpecT = TypeVar("SpecT", bound=CoderSpec)

OperatorChoice = Callable[[BlockSpec, str, ConvSpec], Operator]
"""Block, name of the layer in it, plain layer: the operator it gets."""


def exact_spec(spec: SpecT, *, device_type: str = "cpu") -> SpecT:
    """The spec with each layer's fastest exact operator on a kind of device; the given spec may have twins already."""
    choose = _fastest_on_cpu if device_type == "cpu" else _fastest_elsewhere
    return _with_operators(spec, choose)


def plain_spec(spec: SpecT) -> SpecT:
    """The spec with every exact twin replaced by its plain operator: for surgery, distillation and export."""
    return _with_operators(spec, _plain)


def exact_decoder(decoder: Decoder, *, device_type: str | None = None) -> Decoder:
    """The same decoder with exact operators; it shares the weights, in place, with the one given.

    Args:
        device_type: `cpu` or `cuda`; None: that of the weights.
    """
    device_type = device_type or next(decoder.parameters()).device.type
    return with_spec(decoder, exact_spec(decoder.spec, device_type=device_type))


def exact_coder(coder: CoderT) -> CoderT:
    """The same encoder or decoder with exact operators; it shares the weights, in place, with the one given."""
    return with_spec(coder, exact_spec(coder.spec, device_type=next(coder.parameters()).device.type))


def plain_decoder(decoder: Decoder) -> Decoder:
    """The same decoder with plain operators; it shares the weights, in place, with the one given."""
    return with_spec(decoder, plain_spec(decoder.spec))


def with_spec(coder: CoderT, spec: CoderSpec) -> CoderT:
    """A coder of another spec over the same parameters: the specs differ in exact twins only."""
    assert plain_spec(spec) == plain_spec(coder.spec), "not the same network"
    with torch.device("meta"):
        changed = type(coder)(spec)
    for name, module in changed.named_modules():
        original = coder.get_submodule(name)
        for key, parameter in original._parameters.items():
            module.register_parameter(key, parameter)
        for key, buffer in original._buffers.items():
            module.register_buffer(key, buffer)
        if "eps" in vars(module):  # of a norm whose decoder was scaled for float16
            vars(module)["eps"] = vars(original)["eps"]
    return changed.train(coder.training)


def exact_changes(before: DecoderSpec, after: DecoderSpec) -> list[tuple[str, Operator, Operator]]:
    """Layers of both specs whose operators differ, in forward order: address, operator before, operator after."""
    operators: dict[str, Operator] = {address: layer.operator for address, layer in after.layers()}
    return [
        (address, layer.operator, operators[address])
        for address, layer in before.layers()
        if address in operators and operators[address] != layer.operator
    ]


def _with_operators(spec: SpecT, choose: OperatorChoice) -> SpecT:
    changed: dict[str, BlockSpec] = {}
    for address, block in spec.blocks():
        if block.shrinkage != (1, 1, 1):
            continue  # a layer with strides, which no twin has
        layers: dict[str, ConvSpec] = {}
        for name, layer in block.layers.items():
            plain = layer.model_copy(update={"operator": layer.plain_operator})
            layers[name] = plain.model_copy(update={"operator": choose(block, name, plain)})
        changed[address] = block.with_layers(layers)
    return cast(SpecT, spec.with_blocks(changed))


def _plain(_block: BlockSpec, _name: str, layer: ConvSpec) -> Operator:
    return layer.operator


def _fastest_on_cpu(block: BlockSpec, name: str, layer: ConvSpec) -> Operator:
    if layer.operator != "causal3d" or layer.kernel[0] == 1:
        return _fastest_elsewhere(block, name, layer)
    if layer.out_width <= STACKED_WIDTH and layer.in_width >= 2 * layer.out_width and not layer.num_ahead:
        return "stacked3d"
    if layer.kernel[1:] == (3, 3) and min(layer.in_width, layer.out_width) >= WINOGRAD_WIDTH:
        return "winograd3d"
    return "tapwise3d"


def _fastest_elsewhere(block: BlockSpec, name: str, layer: ConvSpec) -> Operator:
    # Not measured on CUDA: GPU libraries have tuned 3D kernels, so only the upsamplers change.
    folds = isinstance(block, UpsampleSpec) and name == "spatial" and layer.kernel == (1, 3, 3)
    folds = folds and layer.space_padding == "zeros"
    return "subpixel2d" if folds and layer.operator == "frame2d" else layer.operator
