"""Files of TAEHV: light decoders for the latents of another family, which the files do not name.

Three resolutions of three chains each, whose first layer reads the previous frame too. The last one, two or three of
them double every frame, including the first; the surplus frames at the beginning are dropped in the end. The decoder
takes normalized latents and returns frames in [0, 1]; here it takes raw latents and returns [-1, 1], like all decoders.

Reference: madebyollin/taehv (MIT): names and shapes of its files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from flashvaed_cli.artifact.foreign.coders import empty_coder, fill_coder
from flashvaed_cli.artifact.foreign.latents_of import LightFile, family_of_latents
from flashvaed_cli.artifact.foreign.mismatch import Shape
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.spec.blocks import BlockSpec, ChainSpec, ConvBlockSpec, HeadSpec, UpsampleSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec, StageSpec
from flashvaed_cli.decoders.spec.convolutions import frame_conv, point_conv
from flashvaed_cli.decoders.spec.layers import ConvSpec, LatentEntrySpec
from flashvaed_cli.decoders.spec.light import LATENT_LIMIT
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families.family import Family
from flashvaed_cli.families.registry import FAMILIES, are_one_network

TAEHV = "taehv"
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation per latent channel."""
_Put = Callable[[str, Tensor, Tensor | None], tuple[int, int]]
_ENTRY, _HEAD = "decoder.1", "decoder.22"
_CHAINS, _GROWTHS, _CONVS = ((3, 4, 5), (9, 10, 11), (15, 16, 17)), (7, 13, 19), (8, 14, 20)
_SUPER = "decoder.1.conv.0.weight"
_NUM_STAGES, _SPATIAL_FACTOR = 3, 8
_UNKNOWN_LATENTS = {
    "taecvx": "CogVideoX",
    "taeos1_3": "Open-Sora 1.3",
    "taeh3": "MiniMax H3",
}
"""Published files for the latents of models that this version does not know, without their suffix."""


def is_taehv(shapes: Mapping[str, Shape]) -> bool:
    """Whether these are the tensors of a TAEHV, of either size."""
    names = {f"decoder.{index}.conv.weight" for index in _GROWTHS}
    return names <= set(shapes) or (_SUPER in shapes and "decoder.0.weight" in shapes)


def taehv_decoder(
    tensors: Mapping[str, Tensor],
    family_name: str | None,
    location: str,
    statistics_of: Callable[[Family], Statistics],
) -> tuple[Decoder, Family, Statistics]:
    """The decoder of a TAEHV, the family whose latents it reads, and the statistics of these.

    Args:
        family_name: the user's choice; None: the family whose published file has this name, or the only one that fits.
        statistics_of: finds the statistics of a family that has them in its files only.
    Raises:
        ArtifactError: tensors are missing, the family is unclear or does not fit, or its latents have no statistics.
    """
    if _SUPER in tensors:
        raise ArtifactError(
            f"{location}: a TAEHV of the larger (super) kind. This version has no block for its layers: depthwise "
            "kernels of 7 x 7 on two frames side by side, then a pointwise layer twice as wide. Take the smaller file."
        )
    decoder_only = {name: tensor for name, tensor in tensors.items() if not name.startswith("encoder.")}
    file = LightFile("TAEHV", decoder_only, location)
    entry, head = file.take(f"{_ENTRY}.weight", None, None, 3, 3), file.take(f"{_HEAD}.weight", None, None, 3, 3)
    patch = math.isqrt(head.shape[0] // 3)
    family = _family(family_name, entry.shape[1], patch, location)
    statistics = (family.latent_mean, family.latent_std) if family.latent_mean else statistics_of(family)
    with file.building():
        spec, state = _translated(file, entry, head, family, statistics, patch)
    decoder = empty_coder(file.checked(spec))
    fill_coder(decoder, state, location)
    assert isinstance(decoder, Decoder)
    return decoder, family, statistics


def _family(name: str | None, latent_width: int, patch: int, location: str) -> Family:
    """The family whose latents it decodes. Files for several models have the same shapes: a published name decides."""
    published = Path(location).stem
    if published in _UNKNOWN_LATENTS:
        raise ArtifactError(
            f"{location}: {published} is what TAEHV's file for {_UNKNOWN_LATENTS[published]} is called, whose latents "
            "this version does not know. Rename the file if it is for another model."
        )
    named = [one for one in FAMILIES.values() if published in one.elsewhere.taehv]
    if named and name is None and all(are_one_network(named[0], other) for other in named[1:]):
        name = named[0].name
    shape = f"{latent_width} latent channels with patches of {patch}"
    if named:
        shape = f"{shape}, called {published} as the one for {' and '.join(one.name for one in named)}"
    return family_of_latents(
        "TAEHV", shape, name, lambda one: _fits(one, latent_width, patch) and (not named or one in named), location
    )


def _fits(family: Family, latent_width: int, patch: int) -> bool:
    spec = family.decoder_spec(8, family.latent_width)
    is_video = not spec.still and spec.temporal_factor in (2, 4, 8)
    return is_video and (family.latent_width, spec.spatial_factor) == (latent_width, _SPATIAL_FACTOR * patch)


def _translated(
    file: LightFile, entry_weight: Tensor, head_weight: Tensor, family: Family, statistics: Statistics, patch: int
) -> tuple[DecoderSpec, dict[str, Tensor]]:
    """The spec, and the weights under our names."""
    original = family.decoder_spec(8, family.latent_width)
    num_doublings = int(math.log2(original.temporal_factor))
    state: dict[str, Tensor] = {}

    def put(address: str, weight: Tensor, bias: Tensor | None = None) -> tuple[int, int]:
        state[f"stages.{address}.weight"] = weight
        state[f"stages.{address}.bias"] = torch.zeros(len(weight)) if bias is None else bias
        return weight.shape[1], weight.shape[0]

    entry = LatentEntrySpec(mean=statistics[0], std=statistics[1], limit=LATENT_LIMIT)
    widths = put("conv_in.0.conv", entry_weight, file.take(f"{_ENTRY}.bias", len(entry_weight)))
    stages = [
        StageSpec(name="conv_in", blocks=(ConvBlockSpec(conv=frame_conv(*widths), activation="relu", entry=entry),))
    ]
    width = len(entry_weight)
    for stage in range(_NUM_STAGES):
        blocks: list[BlockSpec] = []
        for index, place in enumerate(_CHAINS[stage]):
            blocks.append(_chain(file, f"up{stage}.{index}", f"decoder.{place}.conv", width, put))
        growth = file.take(f"decoder.{_GROWTHS[stage]}.conv.weight", None, width, 1, 1)  # [n * frames, n, 1, 1]
        spatial = file.take(f"decoder.{_CONVS[stage]}.weight", None, width, 3, 3)
        address, doubles = f"up{stage}.{len(blocks)}", stage >= _NUM_STAGES - num_doublings
        grown = width * (2 if doubles else 1)
        if len(growth) not in (grown, 2 * width):  # files may hold channels that the model does not use
            raise ValueError(f"decoder.{_GROWTHS[stage]} makes {len(growth)} channels of {width}, not {grown}")
        growth = growth[-grown:]
        if doubles:
            put(f"{address}.temporal", growth[:, :, 0, 0])
            temporal = point_conv(width, 2 * width)
        else:  # a 1x1 without growth or bias before a kernel: one kernel
            spatial, temporal = torch.einsum("omhw,mc->ochw", spatial, growth[:, :, 0, 0]), None
        _, width = put(f"{address}.spatial", spatial)
        conv = frame_conv(spatial.shape[1], width)
        blocks.append(UpsampleSpec(temporal=temporal, spatial=conv, grows_first=doubles))
        stages.append(StageSpec(name=f"up{stage}", blocks=tuple(blocks)))
    head_bias = file.take(f"{_HEAD}.bias", len(head_weight))
    if len(head_weight) != 3 * patch**2:
        raise ValueError(f"{_HEAD} gives {len(head_weight)} channels, not three colours of square patches")
    order = [c * patch**2 + i * patch + j for c in range(3) for j in range(patch) for i in range(patch)]
    conv = frame_conv(*put("head.0.conv", 2 * head_weight[order], 2 * head_bias[order] - 1))  # [0, 1] to [-1, 1]
    head = HeadSpec(conv=conv, norm=None, activation="relu", lead_frames=original.temporal_factor - 1)
    spec = DecoderSpec(
        family=family.name,
        stages=(*stages, StageSpec(name="head", blocks=(head,))),
        temporal_factor=original.temporal_factor,
        spatial_factor=original.spatial_factor,
        patch=patch,
    )
    return spec, state


def _chain(file: LightFile, address: str, place: str, width: int, put: _Put) -> ChainSpec:
    """The first layer reads a frame and the previous one as channels: here taps in time, the earlier one first."""
    current, previous = file.take(f"{place}.0.weight", width, 2 * width, 3, 3).chunk(2, dim=1)
    put(f"{address}.conv1", torch.stack([previous, current], dim=2), file.take(f"{place}.0.bias", width))
    conv1 = ConvSpec(operator="causal3d", in_width=width, out_width=width, kernel=(2, 3, 3))
    for number, slot in ((2, 2), (3, 4)):
        weight, bias = file.take(f"{place}.{slot}.weight", width, width, 3, 3), file.take(f"{place}.{slot}.bias", width)
        put(f"{address}.conv{number}", weight, bias)
    return ChainSpec(conv1=conv1, conv2=frame_conv(width, width), conv3=frame_conv(width, width))
