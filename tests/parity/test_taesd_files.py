"""Files of TAESD, from diffusers' `AutoencoderTiny` with random weights: the same pixels, whose latents they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flashvaed_cli.artifact.checkpoint import load_checkpoint
from flashvaed_cli.decoders.spec.light import light_shape
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families.registry import get_family

diffusers: Any = pytest.importorskip("diffusers", reason="it is the oracle")

RANGE_BOUND = 1e-4


def random_tiny(latent_width: int) -> nn.Module:
    torch.manual_seed(0)
    tiny = diffusers.AutoencoderTiny(
        latent_channels=latent_width,
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(2, 1, 3, 1),
    )
    return tiny.eval().requires_grad_(False)


def own_file(tiny: nn.Module, path: Path) -> Path:
    """As madebyollin's decoder files name the layers: a clamp stands before them, so numbers are one more."""
    tensors = {}
    for name, tensor in tiny.state_dict().items():
        if name.startswith("decoder.layers."):
            number, _, rest = name.removeprefix("decoder.layers.").partition(".")
            tensors[f"{int(number) + 1}.{rest}"] = tensor.contiguous()
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("kind", ["folder", "own file"])
@pytest.mark.parametrize(("family", "latent_width"), [("stable-diffusion", 4), ("sdxl", 4), ("flux.1", 16)])
@torch.no_grad()
def test_the_same_pixels(family: str, latent_width: int, kind: str, tmp_path: Path) -> None:
    tiny = random_tiny(latent_width)
    place = tmp_path / "tiny"
    if kind == "folder":
        tiny.save_pretrained(place)  # type: ignore[operator]
    else:
        place = own_file(tiny, tmp_path / "taesd_decoder.safetensors")
    checkpoint = load_checkpoint(place, builtins={}, family=family)
    decoder = checkpoint.require_decoder()
    assert (checkpoint.family, light_shape(decoder.spec)) == (family, "tae")
    assert checkpoint.latent_mean == get_family(family).latent_mean and checkpoint.encoder is None
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (checkpoint.latent_mean, checkpoint.latent_std))
    scaled = 2 * torch.randn(2, latent_width, 5, 6)
    expected = tiny.decode(scaled).sample  # type: ignore[operator]
    found = decoder((scaled * std + mean)[:, :, None])[:, :, 0]
    assert float((found - expected).abs().max() / (expected.max() - expected.min())) <= RANGE_BOUND


def test_the_family_is_asked_for(tmp_path: Path) -> None:
    random_tiny(4).save_pretrained(tmp_path / "tiny")  # type: ignore[operator]
    with pytest.raises(ArtifactError, match=r"does not say whose latents .* it fits stable-diffusion, sdxl"):
        load_checkpoint(tmp_path / "tiny", builtins={})
    with pytest.raises(ArtifactError, match=r"for 4 latent channels, which those of wan2\.1 are not"):
        load_checkpoint(tmp_path / "tiny", builtins={}, family="wan2.1")


def test_a_file_that_lacks_a_layer_is_refused(tmp_path: Path) -> None:
    place = own_file(random_tiny(4), tmp_path / "x.safetensors")
    from safetensors.torch import load_file

    tensors = load_file(place)
    del tensors["3.conv.2.bias"]
    save_file(tensors, place)
    with pytest.raises(ArtifactError, match=r"a TAESD without 3\.conv\.2\.bias"):
        load_checkpoint(place, builtins={}, family="sdxl")
