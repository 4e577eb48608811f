"""Our Wan 2.2 against diffusers' `AutoencoderKLWan` with `is_residual`: same random weights, float32, same numbers.

The bounds are those of Wan 2.1. The released size (705 million parameters) runs with `-m bench`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from oracles import Pair, assert_chunks_agree, assert_parity, pair_of, randomised
from torch import Tensor

from flashvaed_cli.artifact.checkpoint import load_checkpoint
from flashvaed_cli.artifact.foreign.layouts import slots, to_foreign
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families.layout import Role
from flashvaed_cli.families.wan22.names import WAN22_DIFFUSERS, WAN22_ORIGINAL
from flashvaed_cli.families.wan22.spec import LATENT_MEAN, LATENT_STD, wan22_decoder_spec, wan22_encoder_spec

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle; pip install '.[dev]'")

FRAME_COUNTS = (1, 5, 9, 17)
CONFIG = {
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "z_dim": 48,
    "latents_mean": list(LATENT_MEAN),
    "latents_std": list(LATENT_STD),
}


def random_pair(base_dim: int, decoder_base_dim: int) -> Pair:
    torch.manual_seed(0)
    oracle = diffusers.AutoencoderKLWan(base_dim=base_dim, decoder_base_dim=decoder_base_dim, **CONFIG)
    return pair_of(randomised(oracle), WAN22_DIFFUSERS)


@pytest.fixture(scope="module")
def small() -> Pair:
    return random_pair(4, 8)


@pytest.mark.parametrize("num_frames", FRAME_COUNTS)
def test_small(small: Pair, num_frames: int) -> None:
    assert small.decoder.spec == wan22_decoder_spec(8) and small.encoder.spec == wan22_encoder_spec(4)
    assert_parity(small, num_frames, 48, 32)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
def test_every_chunk_size_gives_the_same(small: Pair, chunk: int) -> None:
    assert_chunks_agree(small, chunk, num_frames=17, height=32, width=48)


@pytest.mark.bench
@pytest.mark.parametrize("num_frames", [1, 5, 9])
def test_full_size(num_frames: int) -> None:
    pair = random_pair(160, 256)
    assert pair.decoder.spec == wan22_decoder_spec(256) and pair.encoder.spec == wan22_encoder_spec(160)
    assert_parity(pair, num_frames, 32, 32)


def test_no_key_is_left_over(small: Pair) -> None:
    ours = {slot.foreign: slot.shape for c in (small.decoder, small.encoder) for slot in slots(c.spec, WAN22_DIFFUSERS)}
    assert ours == {name: tuple(tensor.shape) for name, tensor in small.oracle.state_dict().items()}


def test_a_saved_folder_loads(small: Pair, tmp_path: Path) -> None:
    small.oracle.save_pretrained(tmp_path)  # type: ignore[operator]
    for location in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        checkpoint = load_checkpoint(location, builtins={})
        assert (checkpoint.family, checkpoint.layout, checkpoint.twins) == ("wan2.2", "wan2.2-diffusers", ())
        assert (checkpoint.latent_mean, checkpoint.latent_std) == (LATENT_MEAN, LATENT_STD)
        latents = torch.randn(1, 48, 2, 1, 2)
        assert torch.equal(decode(checkpoint.require_decoder(), latents), decode(small.decoder, latents))


def test_a_configuration_of_other_widths_or_of_another_family_is_refused(small: Pair, tmp_path: Path) -> None:
    small.oracle.save_pretrained(tmp_path)  # type: ignore[operator]
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for changes, message in (
        ({"decoder_base_dim": 16}, "says decoder_base_dim 16"),
        ({"_class_name": "AutoencoderKLQwenImage"}, r"not of AutoencoderKLQwenImage, .*: they fit wan2\.2"),
    ):
        path.write_text(json.dumps({**config, **changes}))
        with pytest.raises(ArtifactError, match=message):
            load_checkpoint(tmp_path, builtins={})


def original_tensors(pair: Pair) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    roles: tuple[Role, ...] = ("decoder", "encoder")
    for role in roles:
        coder = getattr(pair, role)
        tensors |= to_foreign(coder.state_dict(), coder.spec, WAN22_ORIGINAL)
    return tensors


def test_wans_own_file_loads(small: Pair, tmp_path: Path) -> None:
    torch.save(original_tensors(small), tmp_path / "Wan2.2_VAE.pth")
    checkpoint = load_checkpoint(tmp_path / "Wan2.2_VAE.pth", builtins={})
    assert (checkpoint.family, checkpoint.layout) == ("wan2.2", "wan2.2-original")
    assert (checkpoint.latent_mean, checkpoint.latent_std) == (LATENT_MEAN, LATENT_STD)
    for role in ("decoder", "encoder"):
        for name, value in getattr(small, role).state_dict().items():
            assert torch.equal(getattr(checkpoint, role).state_dict()[name], value)
