"""diffusers' `AutoencoderKLTemporalDecoder` with random weights, at any width that its 32 groups divide."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn


def svd_config(base_width: int = 32, **more: Any) -> dict[str, Any]:
    """The arguments of diffusers' class (released: base width 128)."""
    return {
        "block_out_channels": [base_width * multiple for multiple in (1, 2, 4, 4)],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
        **more,
    }


def random_svd(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """Random weights; norms, biases and shares are drawn too, so that a swap shows, and few pixels are clamped."""
    diffusers: Any = importlib.import_module("diffusers")

    torch.manual_seed(seed)
    model = diffusers.AutoencoderKLTemporalDecoder(**config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
        elif name.endswith("mix_factor"):
            nn.init.normal_(parameter)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    model.get_parameter("decoder.conv_out.weight").mul_(0.3)
    return model
