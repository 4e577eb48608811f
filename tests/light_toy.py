"""Small seeded light decoders for the latents of the toy VAE, and of every family."""

from __future__ import annotations

import torch

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.light import LightShape, light_spec
from tests.toy import LATENT_WIDTH, original_spec

SHAPES: tuple[LightShape, ...] = ("tae", "temporal-tae", "efficientvit")
ALL_SHAPES: tuple[LightShape, ...] = (*SHAPES, "lean")
"""With the one that only originals on its own grid have, and whose streams cannot be pruned."""
WIDTH = 8


def light_toy_spec(shape: LightShape) -> DecoderSpec:
    """Eight wide, for latents whose statistics differ from channel to channel."""
    mean, std = (0.3, -0.2, 0.0, 0.5), (0.8, 1.2, 1.0, 2.0)
    assert len(mean) == LATENT_WIDTH
    return light_spec(shape, original_spec(), WIDTH, mean=mean, std=std)


def filled(spec: DecoderSpec, seed: int = 0) -> Decoder:
    """A decoder whose every weight and bias is random, with activations that neither vanish nor explode."""
    decoder = Decoder(spec).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in decoder.named_parameters():
        if name.endswith("gamma"):
            parameter.uniform_(0.7, 1.3, generator=generator)
        elif name.endswith(("bias", "beta")):
            parameter.normal_(std=0.1, generator=generator)
        else:
            parameter.normal_(std=(1.3 / parameter[0].numel()) ** 0.5, generator=generator)
    for name, parameter in decoder.get_submodule("stages.head.0").named_parameters():
        if name.endswith("weight"):
            parameter.mul_(0.2)
    return decoder


def light_toy(shape: LightShape, seed: int = 0) -> Decoder:
    """`light_toy_spec` with random weights."""
    return filled(light_toy_spec(shape), seed)
