"""FLUX.2's VAE: the network of Stable Diffusion's, with 32 latent channels and a separate width for the decoder.

The decoder takes raw latents: 32 channels at 1/8 of the picture's sides. Diffusion models take patches of 2x2 of them,
128 channels at 1/16, each normalised by a batch norm whose running statistics are in the checkpoint; so each of these
128 has a mean and a deviation.

Reference: diffusers `AutoencoderKLFlux2` and its pipelines (facts only).
"""

from __future__ import annotations

from dataclasses import replace

from flashvaed_cli.decoders.spec.latent_patches import PATCH
from flashvaed_cli.families.family import ComfyUIReader, OtherPrograms
from flashvaed_cli.families.stable_diffusion.config import MULTIPLIERS
from flashvaed_cli.families.stable_diffusion.spec import kl_family

NAME = "flux.2"
LATENT_WIDTH = 32
BATCH_NORM_EPS = 1e-4
_ENCODER_KEY, _DECODER_KEY = "block_out_channels", "decoder_block_out_channels"

_KL = kl_family(NAME, LATENT_WIDTH, 1.0, has_quant=True)
FLUX_2 = replace(
    _KL,
    latent_mean=(),  # the files have their own
    latent_std=(),
    native_obstacle=None,
    config_keys=replace(
        _KL.config_keys,
        fixed={**_KL.config_keys.fixed, "batch_norm_eps": (BATCH_NORM_EPS,), "patch_size": ((PATCH, PATCH),)},
        idle=_KL.config_keys.idle | {"batch_norm_momentum"},
        widths={
            "decoder": ((_DECODER_KEY, MULTIPLIERS), (_ENCODER_KEY, MULTIPLIERS)),
            "encoder": ((_ENCODER_KEY, MULTIPLIERS),),
        },
        has_factors=False,
    ),
    elsewhere=OtherPrograms(comfyui=ComfyUIReader(has_node=False)),
)
