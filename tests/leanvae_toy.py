"""A LeanVAE of base width 4 with weights that a seed tells, as its release names and stores them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from flashvaed_cli.artifact.foreign.writing import to_program
from flashvaed_cli.decoders.modules.coder import Decoder, Encoder
from flashvaed_cli.families.leanvae.names import LEANVAE_ORIGINAL
from flashvaed_cli.families.leanvae.spec import Depths, leanvae_decoder_spec, leanvae_encoder_spec

DEPTHS = Depths(sep_num_layer=1, fusion_num_layer=2, ista_iter_num=2, ista_layer_num=1)
BASE_WIDTH = 4


def leanvae_arguments(latent_width: int) -> dict[str, int]:
    """What its trainer was called with."""
    widths = {"embedding_dim": 4 * BASE_WIDTH, "l_dim": BASE_WIDTH, "h_dim": 3 * BASE_WIDTH}
    return {**DEPTHS._asdict(), **widths, "latent_dim": latent_width}


def leanvae_weights(latent_width: int) -> dict[str, Tensor]:
    """Random weights under the released names; norms, steps and thresholds near those that training begins with."""
    coders = (
        Decoder(leanvae_decoder_spec(BASE_WIDTH, latent_width, DEPTHS)),
        Encoder(leanvae_encoder_spec(BASE_WIDTH, latent_width, DEPTHS)),
    )
    states = [({name: value.detach() for name, value in c.state_dict().items()}, c.spec) for c in coders]
    named = to_program(states, LEANVAE_ORIGINAL, ((), ()))
    named.pop("latent_bottleneck.encoder_phi", None)  # one matrix for both in a released file
    generator = torch.Generator().manual_seed(latent_width)
    found = {}
    for name in sorted(named):
        shape = named[name].shape
        noise = torch.randn(shape, generator=generator)
        if "threshold" in name:
            found[name] = 0.02 + 0.01 * noise.abs()
        elif ".weights." in name or (name.endswith(".0.weight") and len(shape) == 1):
            found[name] = 1 + 0.2 * noise
        else:
            fan_in = shape[1:].numel() if len(shape) > 1 else 25
            found[name] = noise / fan_in**0.5
    return found


def write_leanvae(
    path: Path, latent_width: int = 4, prefix: str = "", changed: Mapping[str, object] | None = None
) -> None:
    """A file as its release, or with a prefix its trainer, writes it."""
    state = {f"{prefix}{name}": tensor for name, tensor in leanvae_weights(latent_width).items()}
    torch.save({"args": {**leanvae_arguments(latent_width), **(changed or {})}, "state_dict": state}, path)


def leanvae_pixels() -> Tensor:
    """A clip of 9 frames, 16 x 24."""
    return torch.rand(1, 3, 9, 16, 24, generator=torch.Generator().manual_seed(9)) * 2 - 1
