"""diffusers' `AutoencoderKL` with random weights: the variants of Stable Diffusion's VAE at any width."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

VARIANTS: dict[str, dict[str, Any]] = {
    "stable-diffusion": {"latent_channels": 4, "scaling_factor": 0.18215},
    "sdxl": {"latent_channels": 4, "scaling_factor": 0.13025},
    "sd3": {
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "flux.1": {
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}
"""What the configurations of the releases say beside the widths, by family."""


def kl_config(name: str, base_width: int = 8, num_groups: int = 4, **more: Any) -> dict[str, Any]:
    """The arguments of diffusers' class for a variant (released: base width 128, 32 groups)."""
    return {
        "block_out_channels": [base_width * multiple for multiple in (1, 2, 4, 4)],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "norm_num_groups": num_groups,
        **VARIANTS[name],
        **more,
    }


def random_kl(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """Random weights; norms and biases are drawn too, so that a swap of two shows, and few pixels are clamped."""
    diffusers: Any = importlib.import_module("diffusers")

    torch.manual_seed(seed)
    return drawn(diffusers.AutoencoderKL(**config))


def drawn(model: nn.Module) -> nn.Module:
    """The model for inference, its norms and biases drawn too."""
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    model.get_parameter("decoder.conv_out.weight").mul_(0.3)
    return model


def flux2_config(base_width: int = 8, num_groups: int = 4, **more: Any) -> dict[str, Any]:
    """The arguments of `AutoencoderKLFlux2` (released: base width 128, 32 groups; 96 in the small decoder)."""
    both = kl_config("flux.1", base_width, num_groups)
    dropped = {"latent_channels", "scaling_factor", "shift_factor", "use_quant_conv", "use_post_quant_conv"}
    return {key: value for key, value in both.items() if key not in dropped} | more


def random_flux2(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """Random weights and statistics, a mean and a variance of its own for every channel of patches."""
    diffusers: Any = importlib.import_module("diffusers")
    torch.manual_seed(seed)
    model = drawn(diffusers.AutoencoderKLFlux2(**config))
    nn.init.normal_(model.get_buffer("bn.running_mean"), std=0.3)
    nn.init.uniform_(model.get_buffer("bn.running_var"), 0.5, 4.0)
    return model
