"""Where the blocks of Wan 2.2 and Qwen-Image 2 live in foreign checkpoints: as in Wan 2.1, but every stage has a name.

`wan2.2-original`: Wan's own `.pth` and ComfyUI's `.safetensors`. `wan2.2-diffusers`: `AutoencoderKLWan` with
`is_residual`. `qwen-image-2-diffusers`: `AutoencoderKLQwenImage21`; other files of it have the same names. A bypass has
weights in pruned decoders only, under the name of the shortcut that has none.

Reference: the key names of those files (facts only).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashvaed_cli.artifact.layouts import Layout
from flashvaed_cli.artifact.wan_keys import WAN_DIFFUSERS, WAN_ORIGINAL
from flashvaed_cli.decoders.qwen_image2 import DOUBLED
from flashvaed_cli.decoders.qwen_image2 import MULTIPLIERS as QWEN2_MULTIPLIERS
from flashvaed_cli.decoders.qwen_image2 import NAME as QWEN2_NAME
from flashvaed_cli.decoders.wan22 import NAME

_RUNS = {"decoder": ("up", 3, "upsamples", "up_blocks", "upsampler")}
_RUNS["encoder"] = ("down", 2, "downsamples", "down_blocks", "downsampler")


def _places(role: str, base: Layout, *, is_original: bool, num_stages: int = 4) -> dict[str, str]:
    """The places of a role: `base`'s outside the stages that change size."""
    stage, num_resblocks, run, diffusers_run, resampler = _RUNS[role]
    shared = base.places["decoder" if role == "decoder" else "encoder"]
    places = {address: place for address, place in shared.items() if not address.startswith(stage)}
    for i in range(num_stages):
        at = f"{role}.{run}.{i}" if is_original else f"{role}.{diffusers_run}.{i}"
        for j in range(num_resblocks):
            places[f"{stage}{i}.{j}"] = f"{at}.{run}.{j}" if is_original else f"{at}.resnets.{j}"
        places[f"{stage}{i}.{num_resblocks}"] = f"{at}.{run}.{num_resblocks}" if is_original else f"{at}.{resampler}"
        places[f"{stage}{i}.bypass"] = f"{at}.avg_shortcut"
    return places


def _layout(name: str, base: Layout, *, is_original: bool) -> Layout:
    places = {role: _places(role, base, is_original=is_original) for role in base.places}
    return replace(base, name=name, family=NAME, places=places)


WAN22_ORIGINAL = _layout("wan2.2-original", WAN_ORIGINAL, is_original=True)
WAN22_DIFFUSERS = _layout("wan2.2-diffusers", WAN_DIFFUSERS, is_original=False)


def _opaque_images(tensors: Mapping[str, Tensor], _config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Without what only videos would need, and without the output for opacity."""
    kept = {name: tensor for name, tensor in tensors.items() if ".time_conv." not in name}
    outputs = ("decoder.conv_out.weight", "decoder.conv_out.bias")
    return {**kept, **{name: kept[name][:3] for name in outputs if name in kept}}


def _with_opacity(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: an output of 1 for opacity, zeros for what no image reaches, norms (alone) as for videos."""
    finished = {
        name: tensor.reshape(-1, 1, 1, 1) if name.endswith(".gamma") and ".attentions." not in name else tensor
        for name, tensor in tensors.items()
    }
    for name in finished.keys() & {"quant_conv.weight", "post_quant_conv.weight"}:
        finished[name] = finished[name].flatten(2).unsqueeze(3)  # [O, C, 1, 1]
    if "decoder.conv_out.bias" in finished:
        weight, bias = finished["decoder.conv_out.weight"], finished["decoder.conv_out.bias"]
        finished["decoder.conv_out.weight"] = torch.cat([weight, torch.zeros_like(weight[:1])])
        finished["decoder.conv_out.bias"] = torch.cat([bias, torch.ones_like(bias[:1])])
    doubled = {f"encoder.down_blocks.{i}.downsampler": 1 for i, doubles in enumerate(DOUBLED) if doubles}
    doubled |= {f"decoder.up_blocks.{i}.upsampler": 2 for i, doubles in enumerate(reversed(DOUBLED)) if doubles}
    for place, factor in doubled.items():
        if (bias := finished.get(f"{place}.resample.1.bias")) is not None:
            finished[f"{place}.time_conv.weight"] = bias.new_zeros(factor * len(bias), len(bias), 1, 1)
            finished[f"{place}.time_conv.bias"] = bias.new_zeros(factor * len(bias))
    return finished


QWEN2_DIFFUSERS = replace(
    WAN_DIFFUSERS,
    name="qwen-image-2-diffusers",
    family=QWEN2_NAME,
    config_class="AutoencoderKLQwenImage21",
    places={
        role: _places(role, WAN_DIFFUSERS, is_original=False, num_stages=len(QWEN2_MULTIPLIERS))
        for role in WAN_DIFFUSERS.places
    },
    prepare=_opaque_images,
    finish=_with_opacity,
)
QWEN2_ORIGINAL = replace(QWEN2_DIFFUSERS, name="qwen-image-2-original", config_class=None)
