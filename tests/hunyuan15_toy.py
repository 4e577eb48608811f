"""diffusers' `AutoencoderKLHunyuanVideo15` with random weights, at any width, and our decoder of that family."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.families.hunyuanvideo15.spec import hunyuan15_decoder_spec
from flashvaed_cli.surgery.respec import narrowed_spec
from tests.toy import LATENT_WIDTH, kept_of


def hunyuan15_config(base_width: int = 8, **more: Any) -> dict[str, Any]:
    """The arguments of diffusers' class (released: base width 128; the encoder's averages ask for multiples of 8)."""
    return {"block_out_channels": [base_width * multiple for multiple in (1, 2, 4, 8, 8)], **more}


def random_hunyuan15(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """Random weights; norms and biases are drawn too, so that a swap of two shows, and few pixels are clamped."""
    diffusers: Any = importlib.import_module("diffusers")

    torch.manual_seed(seed)
    model = diffusers.AutoencoderKLHunyuanVideo15(**config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.normal_(parameter, mean=1.0, std=0.2)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    model.get_parameter("decoder.conv_out.conv.weight").mul_(0.3)
    return model


def hunyuan15_spec() -> DecoderSpec:
    """The original at base width 4, with 4 latent channels."""
    return hunyuan15_decoder_spec(4, LATENT_WIDTH)


def pruned_hunyuan15_spec() -> DecoderSpec:
    """Three quarters of the channels of all stages: two resamplers have a layer for first frames then."""
    spec = hunyuan15_spec()
    return narrowed_spec(spec, kept_of(spec, ("mid", "up0", "up1", "up2", "up3", "up4")))
