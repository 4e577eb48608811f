"""LeanVAE against what its public code gave for the same weights, and against itself in chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flashvaed_cli.artifact.checkpoint import Checkpoint, load_checkpoint
from flashvaed_cli.artifact.foreign.writing import to_program
from flashvaed_cli.decoders.predict.cost import total_gflop
from flashvaed_cli.decoders.run.streaming import decode, encode
from flashvaed_cli.decoders.spec.groups import channel_groups
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families.leanvae.names import LEANVAE_ORIGINAL
from flashvaed_cli.families.leanvae.spec import leanvae_decoder_spec, leanvae_encoder_spec
from flashvaed_cli.surgery.respec import narrowed_spec
from flashvaed_cli.surgery.transfer import transfer_weights
from tests.leanvae_toy import leanvae_pixels, leanvae_weights, write_leanvae

OUTPUTS = load_file(Path(__file__).with_name("leanvae_outputs.safetensors"))
TOLERANCE = 1e-4  # of the range; measured 3e-7


def share(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


@pytest.fixture(params=(4, 16), scope="module")
def vae(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("leanvae") / "LeanVAE.ckpt"
    write_leanvae(path, request.param)
    return load_checkpoint(path, builtins={})


def test_it_is_the_public_codes_network(vae: Checkpoint) -> None:
    width, pixels = vae.latent_width, leanvae_pixels()
    assert (vae.family, vae.notes, vae.latent_std) == ("leanvae", (), (1.0,) * width)
    encoder, decoder = vae.require_encoder(), vae.require_decoder()
    assert share(encode(encoder, pixels), OUTPUTS[f"latents{width}"]) < TOLERANCE
    assert share(encode(encoder, pixels[:, :, :1]), OUTPUTS[f"image_latent{width}"]) < TOLERANCE
    assert share(decoder(OUTPUTS[f"latents{width}"]), 2 * OUTPUTS[f"frames{width}"]) < TOLERANCE
    assert share(decoder(OUTPUTS[f"image_latent{width}"]), 2 * OUTPUTS[f"image{width}"]) < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_every_chunk_gives_the_same(vae: Checkpoint, chunk: int) -> None:
    latents = torch.randn(1, vae.latent_width, 5, 2, 3, generator=torch.Generator().manual_seed(1))
    decoder, encoder = vae.require_decoder(), vae.require_encoder()
    torch.testing.assert_close(decode(decoder, latents, chunk=chunk), decode(decoder, latents), atol=1e-5, rtol=0)
    pixels = leanvae_pixels()
    torch.testing.assert_close(encode(encoder, pixels, chunk=chunk), encode(encoder, pixels), atol=1e-5, rtol=0)


def test_it_is_causal(vae: Checkpoint) -> None:
    latents = torch.randn(1, vae.latent_width, 5, 2, 3, generator=torch.Generator().manual_seed(2))
    changed = latents.clone()
    changed[:, :, 3] += 1
    moved = (vae.require_decoder()(latents) != vae.require_decoder()(changed)).any(dim=(0, 1, 3, 4))
    assert moved.nonzero().min() == 9


def test_a_trainers_file_is_read_too(tmp_path: Path) -> None:
    write_leanvae(tmp_path / "epoch.ckpt", 16, prefix="autoencoder.")
    assert load_checkpoint(tmp_path / "epoch.ckpt", builtins={}).latent_width == 16


@pytest.mark.parametrize(("key", "value"), [("ista_iter_num", 3), ("fusion_num_layer", 4), ("l_dim", 8)])
def test_arguments_that_deny_the_tensors_are_refused(tmp_path: Path, key: str, value: int) -> None:
    write_leanvae(tmp_path / "LeanVAE.ckpt", changed={key: value})
    with pytest.raises(ArtifactError, match=f"{key} is {value}; the weights have"):
        load_checkpoint(tmp_path / "LeanVAE.ckpt", builtins={})


def test_what_is_written_is_what_was_read(vae: Checkpoint) -> None:
    coders = [(coder.state_dict(), coder.spec) for coder in (vae.require_decoder(), vae.require_encoder())]
    written, read = to_program(coders, LEANVAE_ORIGINAL, ((), ())), leanvae_weights(vae.latent_width)
    assert written.keys() == read.keys()
    assert all(torch.equal(written[name], read[name]) for name in read)


def test_dead_inner_channels_can_go(vae: Checkpoint) -> None:
    """Where `contract` reads nothing of the channels to go, pruning changes no frame."""
    decoder = vae.require_decoder()
    groups = channel_groups(decoder.spec)
    kept = {tensor: tuple(range(1, one.width)) for one in groups for tensor in one.tensors}
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("contract.weight"):
                parameter[:, 0] = 0
    latents = torch.randn(1, vae.latent_width, 3, 2, 3, generator=torch.Generator().manual_seed(3))
    pruned = transfer_weights(decoder, narrowed_spec(decoder.spec, kept), kept)
    torch.testing.assert_close(pruned(latents), decoder(latents), atol=1e-5, rtol=0)
    decoder.load_state_dict(before)


@pytest.mark.parametrize("width", [4, 16])
def test_cost_of_the_release(width: int) -> None:
    """17 frames of 256 x 256; the public modules count 0.289 TFLOP to decode."""
    assert total_gflop(leanvae_decoder_spec(128, width), (5, 32, 32)) == pytest.approx(289, abs=0.5)
    both = total_gflop(leanvae_decoder_spec(128, width), (5, 32, 32))
    both += total_gflop(leanvae_encoder_spec(128, width), (17, 256, 256))
    assert both / 2 == pytest.approx(202.6, abs=0.2)  # multiply-adds, in 1e9
