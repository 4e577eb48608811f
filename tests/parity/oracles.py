"""diffusers' VAEs with random weights beside ours with the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashvaed_cli.artifact.foreign.coders import coders_from_foreign
from flashvaed_cli.decoders.modules.coder import Decoder, Encoder
from flashvaed_cli.decoders.run.streaming import decode, encode
from flashvaed_cli.families.layout import Layout

RANGE_BOUND = 1e-4
CHUNK_BOUND = 1e-5


@dataclass
class Pair:
    """The oracle and ours, with the same weights."""

    oracle: nn.Module
    decoder: Decoder
    encoder: Encoder


def randomised(oracle: nn.Module) -> nn.Module:
    """Norms and biases are drawn at random too, so that a swap of two shows."""
    oracle.eval().requires_grad_(False)
    for name, parameter in oracle.named_parameters():
        if name.endswith("gamma"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return oracle


def pair_of(oracle: nn.Module, layout: Layout) -> Pair:
    coders = coders_from_foreign(oracle.state_dict(), layout)
    decoder, encoder = coders["decoder"], coders["encoder"]
    assert isinstance(decoder, Decoder) and isinstance(encoder, Encoder)
    return Pair(oracle, decoder, encoder)


def share_of_range(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / (expected.max() - expected.min()))


@torch.no_grad()
def assert_parity(pair: Pair, num_frames: int, height: int, width: int) -> None:
    """Encoder and decoder, each on the oracle's input, within `RANGE_BOUND` of the range."""
    pixels = torch.rand(1, 3, num_frames, height, width) * 2 - 1
    expected_latents = pair.oracle.encode(pixels).latent_dist.mode()  # type: ignore[operator]
    latents = encode(pair.encoder, pixels)
    expected_frames = pair.oracle.decode(expected_latents).sample  # type: ignore[operator]
    frames = decode(pair.decoder, expected_latents)
    assert frames.shape[2] == num_frames
    encode_error = share_of_range(latents, expected_latents)
    decode_error = share_of_range(frames, expected_frames)
    print(f"{num_frames} frames: encode {encode_error:.1e}, decode {decode_error:.1e} of the range")
    assert encode_error <= RANGE_BOUND
    assert decode_error <= RANGE_BOUND


@torch.no_grad()
def assert_chunks_agree(pair: Pair, chunk: int, *, num_frames: int, height: int, width: int) -> None:
    """Chunked and whole within `CHUNK_BOUND` of the range."""
    pixels = torch.rand(1, 3, num_frames, height, width) * 2 - 1
    latents, frames = encode(pair.encoder, pixels), None
    assert share_of_range(encode(pair.encoder, pixels, chunk=chunk), latents) <= CHUNK_BOUND
    frames = decode(pair.decoder, latents)
    assert share_of_range(decode(pair.decoder, latents, chunk=chunk), frames) <= CHUNK_BOUND
