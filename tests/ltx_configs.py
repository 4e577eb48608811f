"""The configurations of the LTX VAEs in diffusers' terms, at any width, and oracles with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VERSIONS = ("0.9.0", "0.9.1", "0.9.5", "2", "2.3")
FAMILIES = {version: f"ltx-video-{version}" for version in VERSIONS} | {"2": "ltx-2", "2.3": "ltx-2.3"}


def ltx_config(version: str, base_width: int, latent_width: int = 128, **changes: Any) -> dict[str, Any]:
    """What `AutoencoderKLLTXVideo` (2 and 2.3: `AutoencoderKLLTX2Video`) takes; 128 and 128 are the released widths.

    Those encoders begin with as many channels as there are latent ones.
    """
    b = base_width
    config: dict[str, Any] = {"latent_channels": latent_width}
    if version == "0.9.0":
        config |= {"block_out_channels": (b, 2 * b, 4 * b, 4 * b)}
        config |= {"decoder_block_out_channels": (b, 2 * b, 4 * b, 4 * b)}
        return config | changes
    if version == "2":
        config |= {"block_out_channels": (2 * b, 4 * b, 8 * b, 16 * b)}
        config |= {"decoder_block_out_channels": (2 * b, 4 * b, 8 * b)}
        return config | changes
    if version == "2.3":
        config |= {
            "block_out_channels": (2 * b, 4 * b, 8 * b, 8 * b),
            "decoder_block_out_channels": (2 * b, 4 * b, 4 * b, 8 * b),
            "layers_per_block": (4, 6, 4, 2, 2),
            "decoder_layers_per_block": (4, 6, 4, 2, 2),
            "decoder_spatio_temporal_scaling": (True,) * 4,
            "decoder_inject_noise": (False,) * 5,
            "upsample_type": ("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
            "upsample_residual": (False,) * 4,
            "upsample_factor": (2, 2, 1, 2),
            "decoder_spatial_padding_mode": "zeros",
        }
        return config | changes
    config |= {
        "decoder_block_out_channels": (2 * b, 4 * b, 8 * b),
        "decoder_spatio_temporal_scaling": (True, True, True),
        "upsample_residual": (True, True, True),
        "upsample_factor": (2, 2, 2),
        "timestep_conditioning": True,
    }
    if version == "0.9.1":
        config |= {
            "block_out_channels": (b, 2 * b, 4 * b, 4 * b),
            "decoder_layers_per_block": (5, 6, 7, 8),
            "decoder_inject_noise": (True, True, True, False),
        }
        return config | changes
    config |= {
        "block_out_channels": (b, 2 * b, 4 * b, 8 * b, 16 * b),
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
        "layers_per_block": (4, 6, 6, 2, 2),
        "decoder_layers_per_block": (5, 5, 5, 5),
        "spatio_temporal_scaling": (True, True, True, True),
        "decoder_inject_noise": (False, False, False, False),
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    }
    return config | changes


def random_ltx(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """An oracle whose biases, norms, noise scales and statistics are drawn too."""
    import diffusers

    torch.manual_seed(seed)
    is_second = len(config["block_out_channels"]) == 4 and len(config["decoder_block_out_channels"]) == 3
    is_second = (is_second and "timestep_conditioning" not in config) or "upsample_type" in config
    name = "AutoencoderKLLTX2Video" if is_second else "AutoencoderKLLTXVideo"
    build = getattr(diffusers, name)
    oracle = build(**config).eval().requires_grad_(False)
    for name, parameter in oracle.named_parameters():
        if "norm3.weight" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        elif "per_channel_scale" in name:
            nn.init.normal_(parameter, std=0.3)
    nn.init.normal_(oracle.latents_mean)
    nn.init.uniform_(oracle.latents_std, 0.5, 1.5)
    return oracle
