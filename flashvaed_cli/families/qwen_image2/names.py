"""Names of Qwen-Image 2's blocks in foreign checkpoints: as in Wan 2.2, with one more resolution.

`qwen-image-2-diffusers`: `AutoencoderKLQwenImage21`; other files of it have the same names.

Reference: the key names of those files (facts only).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashvaed_cli.families.qwen_image2.spec import DOUBLED, MULTIPLIERS, NAME
from flashvaed_cli.families.wan21.names import WAN_DIFFUSERS
from flashvaed_cli.families.wan22.names import residual_places


def _opaque_images(tensors: Mapping[str, Tensor], _config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors without those for videos, and without the output for opacity."""
    kept = {name: tensor for name, tensor in tensors.items() if ".time_conv." not in name}
    outputs = ("decoder.conv_out.weight", "decoder.conv_out.bias")
    return {**kept, **{name: kept[name][:3] for name in outputs if name in kept}}


def _with_opacity(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse: an opacity of 1, zeros for layers that images never reach; only norms have the shapes for videos."""
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
    family=NAME,
    config_class="AutoencoderKLQwenImage21",
    places={
        role: residual_places(role, WAN_DIFFUSERS, is_original=False, num_stages=len(MULTIPLIERS))
        for role in WAN_DIFFUSERS.places
    },
    prepare=_opaque_images,
    finish=_with_opacity,
)
QWEN2_ORIGINAL = replace(QWEN2_DIFFUSERS, name="qwen-image-2-original", config_class=None)
