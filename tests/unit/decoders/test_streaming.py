"""The same frames for every chunk size.

Float64, where a fault of the chunking cannot hide behind rounding; one float32 test for the promised 1e-5.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashvaed_cli.decoders.modules.coder import Decoder, Encoder
from flashvaed_cli.decoders.modules.memory_format import channels_last, use_channels_last
from flashvaed_cli.decoders.run.streaming import (
    State,
    decode,
    decode_step,
    encode,
    encode_step,
    frame_chunks,
)
from flashvaed_cli.errors import SpecError
from tests.toy import DECODER_SPECS, toy_decoder, toy_encoder, toy_latents

pytestmark = pytest.mark.unchecked  # many runs of what other modules check

EXACT = 1e-10
CHUNK_BOUND = 1e-5
DECODERS = {name: toy_decoder(spec) for name, spec in DECODER_SPECS.items()}
PRECISE = {name: toy_decoder(spec).double() for name, spec in DECODER_SPECS.items()}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return toy_encoder().double()


def assert_close(found: Tensor, expected: Tensor, bound: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


@given(name=st.sampled_from(list(DECODERS)), num_latents=st.integers(1, 6), chunk=st.integers(1, 7))
@settings(max_examples=30)
def test_every_chunk_size_decodes_the_same_frames(name: str, num_latents: int, chunk: int) -> None:
    latents = toy_latents(num_latents, 1, 2).double()
    whole = decode(PRECISE[name], latents)
    assert whole.shape == (1, 3, 1 + 4 * (num_latents - 1), 8, 16)
    assert_close(decode(PRECISE[name], latents, chunk=chunk), whole, EXACT)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_float32_chunks_agree_to_five_digits(name: str, chunk: int) -> None:
    latents = toy_latents(5, 2, 2)
    assert_close(decode(DECODERS[name], latents, chunk=chunk), decode(DECODERS[name], latents), CHUNK_BOUND)


@given(num_latents=st.integers(1, 5), chunk=st.integers(1, 6))
@settings(max_examples=15)
def test_every_chunk_size_encodes_the_same_latents(encoder: Encoder, num_latents: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(num_latents)
    shape = (1, 3, 1 + 4 * (num_latents - 1), 8, 16)
    pixels = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    whole = encode(encoder, pixels)
    assert whole.shape == (1, 4, num_latents, 1, 2)
    assert_close(encode(encoder, pixels, chunk=chunk), whole, EXACT)


@pytest.mark.parametrize("name", DECODERS)
def test_later_latents_change_no_earlier_frame(name: str) -> None:
    latents = toy_latents(4, 1, 2).double()
    whole = decode(PRECISE[name], latents)
    for num_latents in (1, 2, 3):
        first = decode(PRECISE[name], latents[:, :, :num_latents])
        assert_close(whole[:, :, : first.shape[2]], first, EXACT)


@pytest.mark.parametrize("name", DECODERS)
def test_channels_last_gives_the_same_frames(name: str) -> None:
    latents = toy_latents(3, 2, 2).double()
    laid_out = use_channels_last(toy_decoder(DECODER_SPECS[name]).double())
    dense = [p for p in laid_out.parameters() if p.ndim == 5]
    assert all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in dense)
    for chunk in (None, 2):
        frames = decode(laid_out, channels_last(latents), chunk=chunk)
        assert_close(frames, decode(PRECISE[name], latents, chunk=chunk), EXACT)


def test_batches_are_independent() -> None:
    clips = torch.cat([toy_latents(2, 1, 2, seed=seed) for seed in (1, 2)]).double()
    together = decode(PRECISE["flash"], clips, chunk=1)
    for index in (0, 1):
        assert_close(together[index : index + 1], decode(PRECISE["flash"], clips[index : index + 1]), EXACT)


def stream(decoder: Decoder, latents: Tensor, past: State | None) -> tuple[Tensor, State]:
    with torch.no_grad():
        return decode_step(decoder, latents, past)


@pytest.mark.parametrize("name", DECODERS)
def test_interleaved_streams_do_not_disturb_each_other(name: str) -> None:
    decoder = PRECISE[name]
    assert list(decoder.buffers()) == []
    attributes = {module: set(vars(module)) for module in decoder.modules()}
    clips = [toy_latents(3, 1, 2, seed=seed).double() for seed in (1, 2)]
    states: list[State | None] = [None, None]
    parts: list[list[Tensor]] = [[], []]
    for t in range(3):
        for i, latents in enumerate(clips):
            frames, states[i] = stream(decoder, latents[:, :, t : t + 1], states[i])
            parts[i].append(frames)
    for i, latents in enumerate(clips):
        assert_close(torch.cat(parts[i], dim=2).clamp(-1, 1), decode(decoder, latents), EXACT)
    assert {module: set(vars(module)) for module in decoder.modules()} == attributes


@pytest.mark.parametrize("name", DECODERS)
def test_a_state_is_read_not_changed_and_does_not_grow(name: str) -> None:
    decoder, latents = PRECISE[name], toy_latents(4, 1, 2).double()
    _, past = stream(decoder, latents[:, :, :1], None)
    copy = {address: frames.clone() for address, frames in past.items()}
    once, second = stream(decoder, latents[:, :, 1:2], past)
    again, third = stream(decoder, latents[:, :, 1:4], past)
    assert_close(again[:, :, : once.shape[2]], once, EXACT)
    assert all(torch.equal(past[address], frames) for address, frames in copy.items())
    shapes = [{address: frames.shape for address, frames in state.items()} for state in (past, second, third)]
    assert shapes[0] == shapes[1] == shapes[2]


def test_frames_are_clamped() -> None:
    decoder = toy_decoder()
    decoder.get_parameter("stages.head.0.conv.weight").mul_(100)
    frames = decode(decoder, toy_latents(2, 1, 2))
    assert float(frames.min()) == -1.0 and float(frames.max()) == 1.0


def test_wrong_input_is_refused() -> None:
    with pytest.raises(SpecError, match=r"takes latents \[B, 4, T, H, W\], got \[1, 16, 2, 1, 1\]"):
        decode(DECODERS["original"], torch.zeros(1, 16, 2, 1, 1))
    with pytest.raises(SpecError, match="at least 1 latent frame, not 0"):
        decode(DECODERS["original"], toy_latents(), chunk=0)


@pytest.mark.parametrize("shape", [(4, 8, 8), (5, 12, 8), (5, 8, 9)])
def test_videos_that_must_be_padded_are_refused(encoder: Encoder, shape: tuple[int, int, int]) -> None:
    with pytest.raises(SpecError, match="pad the clip first"):
        encode(encoder, torch.zeros(1, 3, *shape, dtype=torch.float64))


def test_later_chunks_are_cut_on_latent_borders(encoder: Encoder) -> None:
    _, past = encode_step(encoder, torch.zeros(1, 3, 1, 8, 8, dtype=torch.float64), None)
    with pytest.raises(SpecError, match="got \\[5, 8, 8\\]"):
        encode_step(encoder, torch.zeros(1, 3, 5, 8, 8, dtype=torch.float64), past)


@given(num_latents=st.integers(1, 9), chunk=st.integers(1, 10), factor=st.sampled_from([1, 2, 4]))
def test_frame_chunks_partition_the_video(num_latents: int, chunk: int, factor: int) -> None:
    pixels = torch.arange(1.0 + factor * (num_latents - 1)).view(1, 1, -1, 1, 1).expand(1, 3, -1, 1, 1)
    parts = list(frame_chunks(pixels, temporal_factor=factor, chunk=chunk))
    assert torch.equal(torch.cat(parts, dim=2), pixels)
    assert len(parts) == -(-num_latents // chunk)
    assert all(part.shape[2] == factor * chunk for part in parts[1:-1])


def test_frames_without_a_batch_are_refused() -> None:
    with pytest.raises(SpecError, match=r"takes frames \[B, 3, F, H, W\], got \[3, 5, 16, 16\]"):
        encode(toy_encoder(), torch.zeros(3, 5, 16, 16))
