"""Names of Wan 2.1's blocks in foreign checkpoints, as data.

`wan-original`: Wan's own `.pth`, ComfyUI's `.safetensors` and the released `Flash_VAED_Wan.pth`.
`diffusers`: `AutoencoderKLWan`.

Reference: the key names of those files (facts only).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flashvaed_cli.families.layout import Layout
from flashvaed_cli.families.separable import unfold_separable
from flashvaed_cli.families.wan21.spec import NAME

ARGUMENTS = (
    "base_dim",
    "z_dim",
    "dim_mult",
    "num_res_blocks",
    "attn_scales",
    "temperal_downsample",
    "latents_mean",
    "latents_std",
)
"""Constructor arguments that all classes with this network share; Wan's class takes more."""
WAN_ARGUMENTS = (
    *ARGUMENTS,
    "decoder_base_dim",
    "is_residual",
    "in_channels",
    "out_channels",
    "patch_size",
    "scale_factor_temporal",
    "scale_factor_spatial",
)

_RESAMPLE = {"spatial": "resample.1", "temporal": "time_conv"}
_ATTENTION = {"norm": "norm", "qkv": "to_qkv", "proj": "proj"}


def _original_decoder_places() -> dict[str, str]:
    places = {"post_quant.0": "conv2", "conv_in.0": "decoder.conv1", "head.0": "decoder.head"}
    places |= {f"mid.{i}": f"decoder.middle.{i}" for i in range(3)}
    # One flat run: up0 to up2 hold three residual blocks and a resampler, up3 three residual blocks.
    return places | {f"up{flat // 4}.{flat % 4}": f"decoder.upsamples.{flat}" for flat in range(15)}


def _original_encoder_places() -> dict[str, str]:
    places = {"conv_in.0": "encoder.conv1", "head.0": "encoder.head", "quant.0": "conv1"}
    places |= {f"mid.{i}": f"encoder.middle.{i}" for i in range(3)}
    return places | {f"down{flat // 3}.{flat % 3}": f"encoder.downsamples.{flat}" for flat in range(11)}


def _diffusers_mid_places(role: str) -> dict[str, str]:
    mid = f"{role}.mid_block"
    return {"mid.0": f"{mid}.resnets.0", "mid.1": f"{mid}.attentions.0", "mid.2": f"{mid}.resnets.1"}


def _diffusers_decoder_places() -> dict[str, str]:
    places = {"post_quant.0": "post_quant_conv", "conv_in.0": "decoder.conv_in", "head.0": "decoder"}
    places |= _diffusers_mid_places("decoder")
    places |= {f"up{i}.{j}": f"decoder.up_blocks.{i}.resnets.{j}" for i in range(4) for j in range(3)}
    return places | {f"up{i}.3": f"decoder.up_blocks.{i}.upsamplers.0" for i in range(3)}


def _diffusers_encoder_places() -> dict[str, str]:
    places = {"conv_in.0": "encoder.conv_in", "head.0": "encoder", "quant.0": "quant_conv"}
    places |= _diffusers_mid_places("encoder")
    return places | {f"down{flat // 3}.{flat % 3}": f"encoder.down_blocks.{flat}" for flat in range(11)}


def _as_the_students_class(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file with separable layers in the form that the released student's class loads strictly; others unchanged.

    That class has the encoder's layer on the latents, `conv1`, though no encoder: here it is an identity.
    """
    unfolded = unfold_separable(tensors, conv1="residual.2", shortcut="shortcut")
    if unfolded.keys() != tensors.keys() and "conv1.weight" not in unfolded:
        like = unfolded["conv2.weight"]
        width = 2 * like.shape[0]
        unfolded["conv1.weight"] = torch.eye(width, dtype=like.dtype).reshape(width, width, 1, 1, 1)
        unfolded["conv1.bias"] = like.new_zeros(width)
    return unfolded


WAN_ORIGINAL = Layout(
    name="wan-original",
    family=NAME,
    places={"decoder": _original_decoder_places(), "encoder": _original_encoder_places()},
    layers={
        "conv": {"conv": ""},
        "resblock": {
            "norm1": "residual.0",
            "conv1": "residual.2",
            "norm2": "residual.3",
            "conv2": "residual.6",
            "shortcut": "shortcut",
        },
        "attention": _ATTENTION,
        "upsample": _RESAMPLE,
        "downsample": _RESAMPLE,
        "head": {"norm": "0", "conv": "2"},
    },
    finish=_as_the_students_class,
)

WAN_DIFFUSERS = Layout(
    name="diffusers",
    family=NAME,
    config_class="AutoencoderKLWan",
    arguments=WAN_ARGUMENTS,
    places={"decoder": _diffusers_decoder_places(), "encoder": _diffusers_encoder_places()},
    layers={
        "conv": {"conv": ""},
        "resblock": {
            "norm1": "norm1",
            "conv1": "conv1",
            "norm2": "norm2",
            "conv2": "conv2",
            "shortcut": "conv_shortcut",
        },
        "attention": _ATTENTION,
        "upsample": _RESAMPLE,
        "downsample": _RESAMPLE,
        "head": {"norm": "norm_out", "conv": "conv_out"},
    },
)
