"""Files of TAESD: light decoders for the latents of an image model, which the files do not name.

A numbered list of layers: a convolution, chains, then repeatedly a doubling of the size, a convolution without bias and
chains, and a last convolution. The decoder takes scaled latents and returns pixels in [0, 1]; here it takes raw latents
and returns [-1, 1], like all decoders.

Reference: madebyollin/taesd (MIT) and diffusers' `AutoencoderTiny`: names and shapes of their files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flashvaed_cli.artifact.foreign.coders import empty_coder, fill_coder
from flashvaed_cli.artifact.foreign.latents_of import LightFile, family_of_latents
from flashvaed_cli.artifact.foreign.mismatch import Shape
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.spec.blocks import BlockSpec, ChainSpec, ConvBlockSpec, HeadSpec, UpsampleSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec, StageSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec, LatentEntrySpec
from flashvaed_cli.decoders.spec.light import LATENT_LIMIT
from flashvaed_cli.families.family import Family

TAESD = "taesd"
TINY_CLASS = "AutoencoderTiny"
_LISTED = "decoder.layers."
_CHAIN_LAYERS = ("conv.0", "conv.2", "conv.4")
_FIXED: dict[str, object] = {
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
    "out_channels": 3,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
}
"""Options of the class that no release changes: other values mean another decoder, or another scale of latents."""


def is_taesd(shapes: Mapping[str, Shape], config_class: str | None) -> bool:
    """Whether these are the tensors of a TAESD: of diffusers' class, or of a decoder's own file."""
    if config_class is not None:
        return config_class == TINY_CLASS
    plain = {"1.weight", "3.conv.0.weight", "3.conv.2.weight", "3.conv.4.weight"}
    listed = {"decoder.layers.0.weight", "decoder.layers.2.conv.0.weight", "decoder.layers.2.conv.4.weight"}
    return plain <= set(shapes) or listed <= set(shapes)


def taesd_decoder(
    tensors: Mapping[str, Tensor], family_name: str | None, location: str, config: Mapping[str, Any]
) -> tuple[Decoder, Family]:
    """The decoder of a TAESD, and the family whose latents it decodes.

    Args:
        family_name: the user's choice; None: detected from the number of latent channels, if only one family fits.
        config: of diffusers' class; empty for a decoder's own file.
    Raises:
        ArtifactError: tensors are missing, superfluous or of other shapes, the configuration is for another decoder, or
            the family is unclear or does not fit.
    """
    prefix = _LISTED if any(name.startswith(_LISTED) for name in tensors) else ""
    decoder_only = {name: tensor for name, tensor in tensors.items() if not name.startswith("encoder.")}
    file = LightFile("TAESD", decoder_only, location)
    numbers = _numbers(decoder_only, prefix)
    if not numbers:
        raise file.fault("it has no numbered layers of a decoder")
    entry = file.take(f"{prefix}{numbers[0]}.weight", None, None, 3, 3)
    latent_width = entry.shape[1]
    _check_configuration(config, latent_width, file)
    shape = f"{latent_width} latent channels"
    family = family_of_latents("TAESD", shape, family_name, lambda one: _fits(one, latent_width), location)
    with file.building():
        spec, state = _translated(file, entry, numbers, prefix, family)
    decoder = empty_coder(file.checked(spec))
    fill_coder(decoder, state, location)
    assert isinstance(decoder, Decoder)
    return decoder, family


def _numbers(names: Iterable[str], prefix: str) -> list[int]:
    """The numbers of the layers that have weights, in order."""
    pattern = re.compile(re.escape(prefix) + r"(\d{1,4})\..+")
    return sorted({int(match[1]) for name in names if (match := pattern.fullmatch(name))})


def _check_configuration(config: Mapping[str, Any], latent_width: int, file: LightFile) -> None:
    """Raise ArtifactError if the configuration is for another decoder; names every key."""
    expected = {**_FIXED, "latent_channels": latent_width}
    faults = [
        f"{key} is {config[key]!r:.40} in its configuration, not {value!r}"
        for key, value in expected.items()
        if config.get(key) is not None and (config[key] != value or isinstance(config[key], bool))
    ]
    if faults:
        raise file.fault("; ".join(faults))


def _fits(family: Family, latent_width: int) -> bool:
    spec = family.decoder_spec(128, family.latent_width)
    return (spec.temporal_factor, spec.spatial_factor, family.latent_width) == (1, 8, latent_width)


def _translated(
    file: LightFile, entry_weight: Tensor, numbers: Sequence[int], prefix: str, family: Family
) -> tuple[DecoderSpec, dict[str, Tensor]]:
    """The spec, and the weights under our names."""
    state: dict[str, Tensor] = {}
    stages: list[StageSpec] = []
    blocks: list[BlockSpec] = []
    width = len(entry_weight)

    def put(address: str, weight: Tensor, bias: Tensor | None) -> ConvSpec:
        state[f"stages.{address}.weight"] = weight
        state[f"stages.{address}.bias"] = torch.zeros(len(weight)) if bias is None else bias
        return ConvSpec(operator="frame2d", in_width=weight.shape[1], out_width=weight.shape[0], kernel=(1, 3, 3))

    def close(address: str) -> None:
        stages.append(StageSpec(name=address, blocks=tuple(blocks)))
        blocks.clear()

    entry = LatentEntrySpec(mean=family.latent_mean, std=family.latent_std, limit=LATENT_LIMIT)
    conv = put("conv_in.0.conv", entry_weight, file.take(f"{prefix}{numbers[0]}.bias", width))
    blocks.append(ConvBlockSpec(conv=conv, activation="relu", entry=entry))
    close("conv_in")
    for number in numbers[1:-1]:
        place, up = f"{prefix}{number}", f"up{len(stages) - 1}"
        address = f"{up}.{len(blocks)}"
        if f"{place}.weight" in file:
            weight = file.take(f"{place}.weight", None, width, 3, 3)
            bias = file.take(f"{place}.bias", len(weight)) if f"{place}.bias" in file else None
            blocks.append(UpsampleSpec(spatial=put(f"{address}.spatial", weight, bias)))
            width = len(weight)
            close(up)
            continue
        convs: dict[str, ConvSpec] = {}
        for index, layer in enumerate(_CHAIN_LAYERS, start=1):
            weight = file.take(f"{place}.{layer}.weight", width, width, 3, 3)
            convs[f"conv{index}"] = put(f"{address}.conv{index}", weight, file.take(f"{place}.{layer}.bias", width))
        blocks.append(ChainSpec(conv1=convs["conv1"], conv2=convs["conv2"], conv3=convs["conv3"]))
    close(f"up{len(stages) - 1}")
    weight, bias = (
        file.take(f"{prefix}{numbers[-1]}.weight", 3, width, 3, 3),
        file.take(f"{prefix}{numbers[-1]}.bias", 3),
    )
    conv = put("head.0.conv", 2 * weight, 2 * bias - 1)  # [0, 1] to [-1, 1]
    blocks.append(HeadSpec(conv=conv, norm=None, activation="none"))
    close("head")
    spec = DecoderSpec(
        family=family.name,
        stages=tuple(stages),
        temporal_factor=1,
        spatial_factor=family.decoder_spec(128, family.latent_width).spatial_factor,
    )
    return spec, state
