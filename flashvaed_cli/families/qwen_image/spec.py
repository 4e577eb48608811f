"""Qwen-Image: the network and latent statistics of Wan 2.1 with a retrained decoder, for single images.

Reference: Qwen-Image VAE. The paper has no layout for it: stages, ratio and operators are the paper's for Wan 2.1.
"""

from __future__ import annotations

from dataclasses import replace

from flashvaed_cli.decoders.spec.coders import DecoderSpec, EncoderSpec
from flashvaed_cli.families.wan21.spec import LATENT_WIDTH, WAN21, wan_decoder_spec, wan_encoder_spec

NAME = "qwen-image"


def qwen_decoder_spec(base_width: int, latent_width: int = LATENT_WIDTH) -> DecoderSpec:
    """The original decoder at a base width (96: the released Qwen-Image)."""
    return wan_decoder_spec(base_width, latent_width).model_copy(update={"family": NAME})


def qwen_encoder_spec(base_width: int, latent_width: int = LATENT_WIDTH) -> EncoderSpec:
    """The original encoder at a base width (96: the released Qwen-Image)."""
    return wan_encoder_spec(base_width, latent_width).model_copy(update={"family": NAME})


QWEN_IMAGE = replace(
    WAN21,
    name=NAME,
    decoder_spec=qwen_decoder_spec,
    encoder_spec=qwen_encoder_spec,
    native_obstacle="its stock class has no separate width for the decoder",
    elsewhere=replace(WAN21.elsewhere, repository="Qwen/Qwen-Image", reads_single_file=False),
)
