"""Our Wan 2.1 against diffusers' `AutoencoderKLWan`: same random weights, float32, same numbers.

The bound of 1e-4 of the output's range leaves room for float32 sums in another order (about 2e-6 is measured);
between chunk sizes the order of the sums inside a convolution is all that may change, hence 1e-5.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashvaed_cli.artifact.checkpoint import load_checkpoint
from flashvaed_cli.artifact.foreign.layouts import slots, to_foreign
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.families.layout import Role
from flashvaed_cli.families.wan21.names import WAN_DIFFUSERS, WAN_ORIGINAL
from flashvaed_cli.families.wan21.spec import wan_decoder_spec, wan_encoder_spec
from tests.parity.oracles import (
    CHUNK_BOUND,
    Pair,
    assert_chunks_agree,
    assert_parity,
    pair_of,
    randomised,
    share_of_range,
)

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle; pip install '.[dev]'")

FRAME_COUNTS = (1, 5, 9, 17)


def random_pair(**config: object) -> Pair:
    return pair_of(randomised(diffusers.AutoencoderKLWan(**config)), WAN_DIFFUSERS)


@pytest.fixture(scope="module")
def small() -> Pair:
    torch.manual_seed(0)
    return random_pair(base_dim=8)


@pytest.fixture(scope="module")
def full_size() -> Pair:
    torch.manual_seed(0)
    return random_pair(base_dim=96)


@pytest.mark.parametrize("num_frames", FRAME_COUNTS)
def test_small(small: Pair, num_frames: int) -> None:
    assert_parity(small, num_frames, 40, 24)


@pytest.mark.parametrize("num_frames", FRAME_COUNTS)
def test_full_size(full_size: Pair, num_frames: int) -> None:
    assert full_size.decoder.spec == wan_decoder_spec(96)
    assert full_size.encoder.spec == wan_encoder_spec(96)
    assert_parity(full_size, num_frames, 32, 32)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
def test_every_chunk_size_gives_the_same(small: Pair, chunk: int) -> None:
    assert_chunks_agree(small, chunk, num_frames=17, height=24, width=32)


def test_full_size_chunks(full_size: Pair) -> None:
    latents = torch.randn(1, 16, 4, 2, 2)
    with torch.no_grad():
        frames = decode(full_size.decoder, latents)
        for chunk in (1, 3):
            assert share_of_range(decode(full_size.decoder, latents, chunk=chunk), frames) <= CHUNK_BOUND


def test_decoder_of_another_width() -> None:
    pair = random_pair(base_dim=4, decoder_base_dim=6)
    assert pair.encoder.spec == wan_encoder_spec(4)
    assert pair.decoder.spec == wan_decoder_spec(6)
    assert_parity(pair, 9, 16, 24)


def test_no_key_is_left_over(small: Pair) -> None:
    ours = {slot.foreign: slot.shape for c in (small.decoder, small.encoder) for slot in slots(c.spec, WAN_DIFFUSERS)}
    assert ours == {name: tuple(tensor.shape) for name, tensor in small.oracle.state_dict().items()}


def test_a_saved_folder_loads(small: Pair, tmp_path: Path) -> None:
    small.oracle.save_pretrained(tmp_path / "whole")  # type: ignore[operator]
    small.oracle.save_pretrained(tmp_path / "shards", max_shard_size="1MB")  # type: ignore[operator]
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    for folder in ("whole", "shards"):
        checkpoint = load_checkpoint(tmp_path / folder, builtins={})
        assert checkpoint.layout == "diffusers"
        assert checkpoint.latent_mean == tuple(config["latents_mean"])
        assert checkpoint.latent_std == tuple(config["latents_std"])
        for role in ("decoder", "encoder"):
            for name, value in getattr(small, role).state_dict().items():
                assert torch.equal(getattr(checkpoint, role).state_dict()[name], value)


def test_the_original_layout_is_that_which_diffusers_converts(small: Pair) -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    if not hasattr(utils, "convert_wan_vae_to_diffusers"):
        pytest.skip("this diffusers has no converter for Wan's own layout")
    roles: tuple[Role, ...] = ("decoder", "encoder")
    coders = {role: getattr(small, role) for role in roles}
    original: dict[str, Tensor] = {}
    for coder in coders.values():
        original |= to_foreign(coder.state_dict(), coder.spec, WAN_ORIGINAL)
    converted = utils.convert_wan_vae_to_diffusers(dict(original))
    expected = small.oracle.state_dict()
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)
