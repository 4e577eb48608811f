"""Our Qwen-Image 2 against diffusers' `AutoencoderKLQwenImage21`, on opaque images: same weights, same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles import RANGE_BOUND, Pair, pair_of, randomised, share_of_range
from safetensors.torch import save_file
from torch.nn import functional as F

from flashvaed_cli.artifact.checkpoint import load_checkpoint
from flashvaed_cli.artifact.foreign.layouts import slots
from flashvaed_cli.artifact.foreign.recognition import recognise
from flashvaed_cli.decoders.run.streaming import decode, encode
from flashvaed_cli.errors import SpecError
from flashvaed_cli.families.qwen_image2.names import QWEN2_DIFFUSERS
from flashvaed_cli.families.qwen_image2.spec import QWEN_IMAGE_2, qwen2_decoder_spec, qwen2_encoder_spec

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle; pip install '.[dev]'")
if not hasattr(diffusers, "AutoencoderKLQwenImage21"):
    pytest.skip("this diffusers has no Qwen-Image 2", allow_module_level=True)


def random_pair(**widths: int) -> Pair:
    torch.manual_seed(0)
    return pair_of(randomised(diffusers.AutoencoderKLQwenImage21(**widths)), QWEN2_DIFFUSERS)


@pytest.fixture(scope="module")
def small() -> Pair:
    return random_pair(base_dim=4, decoder_base_dim=8, z_dim=8)


@torch.no_grad()
def assert_parity(pair: Pair, height: int, width: int, batch: int = 1) -> None:
    """Opaque images: opacity 1 goes in, and what comes out for it is left aside."""
    pixels = torch.rand(batch, 3, 1, height, width) * 2 - 1
    opaque = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, 1), value=1.0)
    expected_latents = pair.oracle.encode(opaque).latent_dist.mode()  # type: ignore[operator]
    latents = encode(pair.encoder, pixels)
    expected = pair.oracle.decode(expected_latents).sample[:, :3]  # type: ignore[operator]
    errors = (
        share_of_range(latents, expected_latents),
        share_of_range(decode(pair.decoder, expected_latents), expected),
    )
    print(f"encode {errors[0]:.1e}, decode {errors[1]:.1e} of the range")
    assert max(errors) <= RANGE_BOUND


@pytest.mark.parametrize(("height", "width", "batch"), [(32, 48, 1), (16, 16, 2), (80, 32, 1)])
def test_small(small: Pair, height: int, width: int, batch: int) -> None:
    assert small.decoder.spec == qwen2_decoder_spec(8, 8) and small.encoder.spec == qwen2_encoder_spec(4, 8)
    assert_parity(small, height, width, batch)


@pytest.mark.bench
def test_full_size() -> None:
    pair = random_pair()
    assert pair.decoder.spec == qwen2_decoder_spec(144) and pair.encoder.spec == qwen2_encoder_spec(96)
    assert_parity(pair, 32, 32)


def test_what_is_left_over_are_the_temporal_resamplers(small: Pair) -> None:
    ours = {slot.foreign for c in (small.decoder, small.encoder) for slot in slots(c.spec, QWEN2_DIFFUSERS)}
    assert {name for name in small.oracle.state_dict() if name not in ours} == {
        f"{place}.time_conv.{end}"
        for place in (
            *(f"decoder.up_blocks.{i}.upsampler" for i in range(3)),
            *(f"encoder.down_blocks.{i}.downsampler" for i in range(1, 4)),
        )
        for end in ("weight", "bias")
    }
    assert ours <= set(small.oracle.state_dict())


def test_the_statistics_are_those_of_diffusers() -> None:
    config = diffusers.AutoencoderKLQwenImage21(base_dim=4, decoder_base_dim=4).config
    assert tuple(config["latents_mean"]) == QWEN_IMAGE_2.latent_mean
    assert tuple(config["latents_std"]) == QWEN_IMAGE_2.latent_std


def test_files_tell_the_family(tmp_path: Path) -> None:
    oracle = randomised(diffusers.AutoencoderKLQwenImage21(base_dim=4, decoder_base_dim=4))
    oracle.save_pretrained(tmp_path / "vae")  # type: ignore[operator]
    tensors = oracle.state_dict()
    save_file(tensors, tmp_path / "bare.safetensors")
    for name in ("vae", "bare.safetensors"):
        checkpoint = load_checkpoint(tmp_path / name, builtins={})
        assert (checkpoint.family, checkpoint.layout) == ("qwen-image-2", "qwen-image-2-diffusers")
        assert (checkpoint.notes, checkpoint.twins) == ((), ())
        assert checkpoint.latent_mean == QWEN_IMAGE_2.latent_mean
    decoder = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith("decoder.")}
    assert recognise(decoder).family == "qwen-image-2"


def test_videos_are_refused(small: Pair) -> None:
    with pytest.raises(SpecError, match="takes 1 latent frame"):
        decode(small.decoder, torch.randn(1, 8, 2, 2, 2))
    with pytest.raises(SpecError, match="single images"):
        encode(small.encoder, torch.randn(1, 3, 9, 16, 16))
