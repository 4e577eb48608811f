"""Files of TAESD: light decoders for the latents of an image model, which the file does not name.

One list of layers, numbered: a convolution, chains, then in turn a doubling of the size, a convolution without bias and
chains, and a last convolution. The decoder takes scaled latents and gives pixels in [0, 1]; here it takes raw ones and
gives [-1, 1], as all decoders do.

Reference: madebyollin/taesd (MIT) and diffusers' `AutoencoderTiny`: names and shapes of their files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from flashvaed_cli.artifact.foreign.coders import empty_coder, fill_coder
from flashvaed_cli.artifact.foreign.latents_of import family_of_latents
from flashvaed_cli.artifact.foreign.mismatch import Shape
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.spec.blocks import BlockSpec, ChainSpec, ConvBlockSpec, HeadSpec, UpsampleSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec, StageSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec, LatentEntrySpec
from flashvaed_cli.decoders.spec.light import LATENT_LIMIT
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families.family import Family

TAESD = "taesd"
TINY_CLASS = "AutoencoderTiny"
_NAME = re.compile(r"(?:decoder\.layers\.|decoder\.)?(\d+)\.(.+)")
_CHAIN_LAYERS = ("conv.0", "conv.2", "conv.4")


def is_taesd(shapes: Mapping[str, Shape], config_class: str | None) -> bool:
    """Whether these are the tensors of a TAESD: of diffusers' class, or of a decoder's own file."""
    if config_class is not None:
        return config_class == TINY_CLASS
    plain = {"1.weight", "3.conv.0.weight", "3.conv.2.weight", "3.conv.4.weight"}
    listed = {"decoder.layers.0.weight", "decoder.layers.2.conv.0.weight", "decoder.layers.2.conv.4.weight"}
    return plain <= set(shapes) or listed <= set(shapes)


def taesd_decoder(tensors: Mapping[str, Tensor], family_name: str | None, location: str) -> tuple[Decoder, Family]:
    """The decoder of a TAESD, and the family whose latents it reads.

    Args:
        family_name: what the user says; None: told from the number of latent channels, if one family alone fits.
    Raises:
        ArtifactError: tensors are missing, or the family is not clear or does not fit.
    """
    layers = _numbered(tensors)
    try:
        latent_width = layers[min(layers)]["weight"].shape[1]
        shape = f"{latent_width} latent channels"
        family = family_of_latents("TAESD", shape, family_name, lambda one: _fits(one, latent_width), location)
        spec, state = _translated(layers, family)
        decoder = empty_coder(spec)
    except (KeyError, RuntimeError, ValueError, IndexError) as error:
        raise ArtifactError(f"{location}: a TAESD whose tensors do not fit each other ({error!s:.200}).") from error
    fill_coder(decoder, state, location)
    assert isinstance(decoder, Decoder)
    return decoder, family


def _numbered(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The decoder's tensors by the number of their layer and their name in it, in order."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = None if name.startswith("encoder.") else _NAME.fullmatch(name)
        if match is not None:
            found.setdefault(int(match[1]), {})[match[2]] = tensor.float()
    return dict(sorted(found.items()))


def _fits(family: Family, latent_width: int) -> bool:
    spec = family.decoder_spec(128, family.latent_width)
    return (spec.temporal_factor, spec.spatial_factor, family.latent_width) == (1, 8, latent_width)


def _translated(layers: Mapping[int, Mapping[str, Tensor]], family: Family) -> tuple[DecoderSpec, dict[str, Tensor]]:
    """The spec, and the weights under our names."""
    state: dict[str, Tensor] = {}
    stages: list[StageSpec] = []
    blocks: list[BlockSpec] = []
    first, last = min(layers), max(layers)

    def put(address: str, weight: Tensor, bias: Tensor | None) -> ConvSpec:
        state[f"stages.{address}.weight"] = weight
        state[f"stages.{address}.bias"] = torch.zeros(len(weight)) if bias is None else bias
        return ConvSpec(operator="frame2d", in_width=weight.shape[1], out_width=weight.shape[0], kernel=(1, 3, 3))

    def close(address: str) -> None:
        stages.append(StageSpec(name=address, blocks=tuple(blocks)))
        blocks.clear()

    for number, layer in layers.items():
        up = f"up{max(len(stages) - 1, 0)}"
        if number == first:
            entry = LatentEntrySpec(mean=family.latent_mean, std=family.latent_std, limit=LATENT_LIMIT)
            conv = put("conv_in.0.conv", layer["weight"], layer["bias"])
            blocks.append(ConvBlockSpec(conv=conv, activation="relu", entry=entry))
            close("conv_in")
        elif number == last:
            close(up)
            conv = put("head.0.conv", 2 * layer["weight"], 2 * layer["bias"] - 1)  # [0, 1] to [-1, 1]
            blocks.append(HeadSpec(conv=conv, norm=None, activation="none"))
            close("head")
        elif "weight" in layer:
            conv = put(f"{up}.{len(blocks)}.spatial", layer["weight"], layer.get("bias"))
            blocks.append(UpsampleSpec(spatial=conv))
            close(up)
        else:
            address = f"{up}.{len(blocks)}"
            convs = {
                f"conv{index}": put(f"{address}.conv{index}", layer[f"{name}.weight"], layer[f"{name}.bias"])
                for index, name in enumerate(_CHAIN_LAYERS, start=1)
            }
            blocks.append(ChainSpec(conv1=convs["conv1"], conv2=convs["conv2"], conv3=convs["conv3"]))
    spec = DecoderSpec(
        family=family.name,
        stages=tuple(stages),
        temporal_factor=1,
        spatial_factor=family.decoder_spec(128, family.latent_width).spatial_factor,
    )
    return spec, state
