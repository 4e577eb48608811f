"""Our Qwen-Image against diffusers' `AutoencoderKLQwenImage`, videos too; and the decoder of single images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles import RANGE_BOUND, Pair, assert_parity, pair_of, randomised, share_of_range
from safetensors.torch import save_file

from flashvaed_cli.artifact.checkpoint import load_checkpoint
from flashvaed_cli.artifact.foreign.layouts import slots, to_foreign
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.decoders.variants.still import still_decoder
from flashvaed_cli.families.qwen_image.names import QWEN_DIFFUSERS, QWEN_ORIGINAL
from flashvaed_cli.families.qwen_image.spec import QWEN_IMAGE, qwen_decoder_spec, qwen_encoder_spec

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle; pip install '.[dev]'")


@pytest.fixture(scope="module")
def small() -> Pair:
    torch.manual_seed(0)
    return pair_of(randomised(diffusers.AutoencoderKLQwenImage(base_dim=8)), QWEN_DIFFUSERS)


@pytest.mark.parametrize("num_frames", [1, 5, 9])
def test_small(small: Pair, num_frames: int) -> None:
    assert small.decoder.spec == qwen_decoder_spec(8) and small.encoder.spec == qwen_encoder_spec(8)
    assert_parity(small, num_frames, 40, 24)


def test_full_size() -> None:
    torch.manual_seed(0)
    assert_parity(pair_of(randomised(diffusers.AutoencoderKLQwenImage()), QWEN_DIFFUSERS), 1, 32, 32)


def test_the_decoder_of_single_images_gives_the_oracles_pixels(small: Pair) -> None:
    latents = torch.randn(2, 16, 1, 5, 4)
    with torch.no_grad():
        expected = small.oracle.decode(latents).sample  # type: ignore[operator]
    found = share_of_range(decode(still_decoder(small.decoder), latents), expected)
    print(f"single images: {found:.1e} of the range")
    assert found <= RANGE_BOUND


def test_no_key_is_left_over(small: Pair) -> None:
    ours = {slot.foreign: slot.shape for c in (small.decoder, small.encoder) for slot in slots(c.spec, QWEN_DIFFUSERS)}
    assert ours == {name: tuple(tensor.shape) for name, tensor in small.oracle.state_dict().items()}


def test_the_statistics_are_those_of_diffusers(small: Pair) -> None:
    assert tuple(small.oracle.config["latents_mean"]) == QWEN_IMAGE.latent_mean  # type: ignore[index]
    assert tuple(small.oracle.config["latents_std"]) == QWEN_IMAGE.latent_std  # type: ignore[index]


def test_a_saved_folder_tells_the_family(small: Pair, tmp_path: Path) -> None:
    small.oracle.save_pretrained(tmp_path)  # type: ignore[operator]
    for location in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        checkpoint = load_checkpoint(location, builtins={})
        assert (checkpoint.family, checkpoint.layout, checkpoint.twins) == ("qwen-image", "qwen-diffusers", ())
        assert checkpoint.decoder is not None and checkpoint.decoder.spec.family == "qwen-image"


def test_a_bare_file_may_be_of_wan_or_qwen(small: Pair, tmp_path: Path) -> None:
    tensors = to_foreign(small.decoder.state_dict(), small.decoder.spec, QWEN_ORIGINAL)
    tensors |= to_foreign(small.encoder.state_dict(), small.encoder.spec, QWEN_ORIGINAL)
    path = tmp_path / "qwen_image_vae.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    bare = load_checkpoint(path, builtins={})
    assert (bare.family, bare.twins) == ("wan2.1", ("qwen-image",))
    named = load_checkpoint(path, builtins={}, family="qwen-image")
    assert (named.family, named.twins) == ("qwen-image", ())
    assert (named.latent_mean, named.latent_std) == (bare.latent_mean, bare.latent_std)
    latents = torch.randn(1, 16, 1, 2, 2)
    assert torch.equal(decode(named.require_decoder(), latents), decode(bare.require_decoder(), latents))
