"""Write `leanvae_outputs.safetensors`: what the public LeanVAE code gives for the weights of `tests/leanvae_toy.py`.

python -m tests.parity.make_leanvae_outputs CLONE, where CLONE is a clone of github.com/westlake-repl/LeanVAE; its
dependency einops must be importable. Only its three network modules are loaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.leanvae_toy import leanvae_arguments, leanvae_pixels, leanvae_weights

OUTPUTS = Path(__file__).with_name("leanvae_outputs.safetensors")


def load_class(clone: Path) -> type:
    """The autoencoder's class, without the packages that only training needs."""
    for name in ("pywt", "LeanVAE", "LeanVAE.modules", "LeanVAE.utils", "LeanVAE.models"):
        sys.modules[name] = package = types.ModuleType(name)
        package.__path__ = [str(clone / name.replace(".", "/"))]
    networks = load_module(clone, "LeanVAE.modules.backbones")
    for name in ("Encoder_Arch", "Decoder_Arch", "ISTA"):
        setattr(sys.modules["LeanVAE.modules"], name, getattr(networks, name))
    setattr(sys.modules["LeanVAE.modules"], "DiagonalGaussianDistribution", object)  # noqa: B010
    return load_module(clone, "LeanVAE.models.autoencoder").LeanVAE


def load_module(clone: Path, name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, clone / f"{name.replace('.', '/')}.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def main(clone: Path) -> None:
    autoencoder, found = load_class(clone), {}
    for latent_width in (4, 16):
        arguments = {"use_tile_inference": False, "chunksize_enc": 9, "chunksize_dec": 5}
        vae = autoencoder(argparse.Namespace(**leanvae_arguments(latent_width), **arguments)).eval()
        vae.load_state_dict(leanvae_weights(latent_width), strict=True)
        pixels = leanvae_pixels() / 2
        latents = found[f"latents{latent_width}"] = vae.encode(pixels).contiguous()
        found[f"frames{latent_width}"] = vae.decode(latents).contiguous()
        image = found[f"image_latent{latent_width}"] = vae.encode(pixels[:, :, :1]).contiguous()
        found[f"image{latent_width}"] = vae.decode(image, is_image=True)[:, :, None].contiguous()
    save_file(found, OUTPUTS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
