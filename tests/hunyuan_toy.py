"""diffusers' `AutoencoderKLHunyuanVideo` with random weights, at any width."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn


def hunyuan_config(base_width: int = 8, num_groups: int = 4, **more: Any) -> dict[str, Any]:
    """The arguments of diffusers' class (released: base width 128, 32 groups)."""
    widths = [base_width * multiple for multiple in (1, 2, 4, 4)]
    return {"block_out_channels": widths, "norm_num_groups": num_groups, **more}


def random_hunyuan(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """Random weights; norms and biases are drawn too, so that a swap of two shows, and few pixels are clamped."""
    diffusers: Any = importlib.import_module("diffusers")

    torch.manual_seed(seed)
    model = diffusers.AutoencoderKLHunyuanVideo(**config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    model.get_parameter("decoder.conv_out.conv.weight").mul_(0.3)
    return model
