"""Names of LTX's blocks in foreign checkpoints, as data, and the conversion of their tensors.

`ltx-VERSION-original`: LTX's single files (`vae.` before every name, with the diffusion model) and the released
`Flash_VAED_LTX.pth`. `ltx-VERSION-diffusers`: `AutoencoderKLLTXVideo`, LTX-2: `AutoencoderKLLTX2Video`.

Reference: the key names of those files (facts only).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from flashvaed_cli.decoders.spec.coders import CoderSpec
from flashvaed_cli.families.family import Family
from flashvaed_cli.families.layout import Layout
from flashvaed_cli.families.ltx.config import SEPARABLE_CAUSAL
from flashvaed_cli.families.ltx.spec import DECODE_TIMESTEP, LTX_2_CLASS, LTX_VIDEO
from flashvaed_cli.families.ltx.timestep import CONDITION, fold_timestep, unfold_timestep

ARGUMENTS = (
    "in_channels",
    "out_channels",
    "latent_channels",
    "block_out_channels",
    "down_block_types",
    "decoder_block_out_channels",
    "layers_per_block",
    "decoder_layers_per_block",
    "spatio_temporal_scaling",
    "decoder_spatio_temporal_scaling",
    "decoder_inject_noise",
    "downsample_type",
    "upsample_residual",
    "upsample_factor",
    "timestep_conditioning",
    "patch_size",
    "patch_size_t",
    "resnet_norm_eps",
    "scaling_factor",
    "encoder_causal",
    "decoder_causal",
    "spatial_compression_ratio",
    "temporal_compression_ratio",
)
LTX2_ARGUMENTS = (*ARGUMENTS, "upsample_type", "encoder_spatial_padding_mode", "decoder_spatial_padding_mode")
_MODEL_NAMES = re.compile(r"per_channel_statistics\.|^latents_mean$|^decoder\.up_blocks\.\d\.res_blocks\.")

_STATISTICS = {
    "original": ("per_channel_statistics.mean-of-means", "per_channel_statistics.std-of-means"),
    "diffusers": ("latents_mean", "latents_std"),
}
_OTHER_STATISTICS = (("mean_of_means", "std_of_means"),)
_STATISTIC_NAMES = {name for pair in (*_STATISTICS.values(), *_OTHER_STATISTICS) for name in pair}

_LAYERS = {
    "conv": {"conv": "conv"},
    "resblock": {
        "norm1": "norm1",
        "conv1": "conv1.conv",
        "norm2": "norm2",
        "conv2": "conv2.conv",
        "noise1": "per_channel_scale1",
        "noise2": "per_channel_scale2",
    },
    "shuffle_upsample": {"conv": "conv.conv"},
    "strided_downsample": {"conv": "conv"},
    "unshuffle_downsample": {"conv": "conv.conv"},
    "head": {"norm": "norm_out", "conv": "conv_out.conv"},
}
_SHORTCUTS = {
    "original": {"shortcut_norm": "norm3.norm", "shortcut": "conv_shortcut"},
    "diffusers": {"shortcut_norm": "norm3", "shortcut": "conv_shortcut.conv"},
}


def _layers(style: str) -> dict[str, dict[str, str]]:
    return {**_LAYERS, "resblock": {**_LAYERS["resblock"], **_SHORTCUTS[style]}}


def _ends(role: str) -> dict[str, str]:
    return {"conv_in.0": f"{role}.conv_in", "head.0": role}


def _original_places(spec: CoderSpec) -> dict[str, str]:
    """One flat list: each run of blocks that keep the width is one entry, and so is each other block."""
    side = "up" if spec.role == "decoder" else "down"
    places, entry = _ends(spec.role), 0
    for stage in spec.stages[1:-1]:
        run = -1  # blocks so far in the entry; -1: none is open
        for index, block in enumerate(stage.blocks):
            keeps = block.kind == "resblock" and block.shortcut is None
            if not keeps and run >= 0:
                entry, run = entry + 1, -1
            place = f"{spec.role}.{side}_blocks.{entry}"
            if keeps:
                run += 1
                places[f"{stage.name}.{index}"] = f"{place}.res_blocks.{run}"
            else:
                places[f"{stage.name}.{index}"] = place
                entry += 1
        entry += run >= 0
    return places


def _diffusers_places(spec: CoderSpec) -> dict[str, str]:
    """Blocks of a stage by role; the block that changes the width begins an up stage and ends a down stage."""
    side, changer, sampler = (
        ("up", "conv_in", "upsamplers") if spec.role == "decoder" else ("down", "conv_out", "downsamplers")
    )
    places = _ends(spec.role)
    for stage in spec.stages[1:-1]:
        number = re.sub(r"\D", "", stage.name)
        place = f"{spec.role}.{side}_blocks.{number}" if number else f"{spec.role}.mid_block"
        run = 0
        for index, block in enumerate(stage.blocks):
            if block.kind != "resblock":
                name = f"{sampler}.0"
            elif block.shortcut is not None:
                name = changer
            else:
                name, run = f"resnets.{run}", run + 1
            places[f"{stage.name}.{index}"] = f"{place}.{name}"
    return places


def prepare(tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, style: str) -> dict[str, Tensor]:
    """Only the blocks' tensors, under the layout's names: no statistics, no embedding of the timestep."""
    blocks = {name: tensor for name, tensor in tensors.items() if not _is_statistic(name)}
    timestep = config.get("decode_timestep")
    return fold_timestep(_with_inner_names(blocks, style), DECODE_TIMESTEP if timestep is None else float(timestep))


def _is_statistic(name: str) -> bool:
    return name.startswith("per_channel_statistics.") or name in _STATISTIC_NAMES


_INNER = re.compile(r"\.(conv1|conv2|conv_in|conv_out|conv)\.(?=(depthwise_conv|pointwise_conv|weight|bias))")
# In the authors' LTX student; elsewhere these parts end in `_conv`.
_RELEASED_PARTS = re.compile(r"\.(depthwise|pointwise)\.(?=weight$|bias$)")


def _with_inner_names(tensors: Mapping[str, Tensor], style: str) -> dict[str, Tensor]:
    """Insert the inner `conv` of LTX's causal layer, which students with another layer in its place lack.

    Reference: the names in the released students' code; no such LTX file was at hand.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = _RELEASED_PARTS.sub(r".\1_conv.", name)
        inner = _INNER.search(name)
        if inner is not None and ".conv." not in name:
            name = f"{name[: inner.end()]}conv.{name[inner.end() :]}"
        if ".conv_shortcut." in name:
            name = name.replace(".conv_shortcut.conv.", ".conv_shortcut.")
            name = name.replace(".conv_shortcut.", f".{_SHORTCUTS[style]['shortcut']}.")
        renamed[name] = tensor
    return renamed


def implied(names: Iterable[str]) -> dict[str, Any]:
    """The released student is known by its names: its depthwise layers pad causally, its dense ones are centred."""
    return {SEPARABLE_CAUSAL: True} if any(_RELEASED_PARTS.search(name) for name in names) else {}


def _class_of(family: Family) -> dict[str, Any]:
    if family not in LTX_2_CLASS:
        return {"config_class": "AutoencoderKLLTXVideo", "arguments": ARGUMENTS}
    blocks = family.config_keys.fixed["down_block_types"][-1]  # that class has its own names for blocks
    return {
        "config_class": "AutoencoderKLLTX2Video",
        "arguments": LTX2_ARGUMENTS,
        "settings": {"down_block_types": blocks},
    }


def _layout(family: Family, style: str) -> Layout:
    decoder = family.decoder_spec(8, family.latent_width)
    place = _original_places if style == "original" else _diffusers_places
    return Layout(
        name=f"{family.name.replace('-video', '')}-{style}",
        family=family.name,
        places={
            "decoder": place(decoder),
            "encoder": place(family.encoder_spec(8, family.latent_width)),
        },
        layers=_layers(style),
        gain="weight",
        by_blocks=True,
        is_shifted=decoder.decode_timestep is not None,
        prepare=partial(prepare, style=style),
        implied=implied,
        finish=partial(unfold_timestep, style=style),
        statistics=_STATISTICS[style],
        other_statistics=_OTHER_STATISTICS,
        prefix="vae." if style == "original" else "",
        model="LTX-Video",
        model_names=_MODEL_NAMES,
        condition=CONDITION,
        **_class_of(family) if style == "diffusers" else {},
    )


LTX_ORIGINALS = tuple(_layout(family, "original") for family in (*LTX_VIDEO, *LTX_2_CLASS))
LTX_DIFFUSERS = tuple(_layout(family, "diffusers") for family in (*LTX_VIDEO, *LTX_2_CLASS))
