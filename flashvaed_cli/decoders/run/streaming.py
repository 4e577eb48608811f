"""Decode and encode videos of any length chunk by chunk, with the same result for every chunk size.

The state between chunks is an explicit value: a dictionary from layer address to the last frames that the layer has
seen. Its size depends on the frame size only, not on the length of the video, but for attention over earlier frames,
whose keys and values it holds.

This is the plain contract, and the schedule of its steps. `runtime.py` takes the same steps with tiles, another dtype
or compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.modules.coder import Decoder, Encoder
from flashvaed_cli.decoders.predict.lookahead import latent_windows
from flashvaed_cli.decoders.run.temporal_tiles import Blender, encode_in_tiles
from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec
from flashvaed_cli.errors import SpecError

State = dict[str, Tensor]
Step = Callable[..., Tensor]
"""`step(latents, first=..., last=...)` decodes a window's latents `[B, C, n, Hz, Wz]` to frames `[B, 3, f, H, W]`, not
clamped. `first`: there is no state to read; `last`: none is needed afterwards."""


def check_latents(spec: DecoderSpec, latents: Tensor) -> None:
    """Refuse latents that are not `[B, C, T, H, W]` with the decoder's channels, or too long for it.

    Raises:
        SpecError: they are not.
    """
    if latents.ndim != 5 or latents.shape[1] != spec.latent_width or 0 in latents.shape:
        raise SpecError(f"the decoder takes latents [B, {spec.latent_width}, T, H, W], got {list(latents.shape)}")
    spec.require_length(latents.shape[2])


def decode_step(
    decoder: Decoder, latents: Float[Tensor, "B C T Hz Wz"], past: State | None
) -> tuple[Float[Tensor, "B 3 F H W"], State]:
    """Decode one chunk of raw latents; returns its frames (not clamped) and the state for the next chunk.

    Raises:
        SpecError: the decoder sees frames ahead or whole clips, so it has no state to pass on: use `DecodeRuntime`.
    """
    if not decoder.spec.is_causal:
        raise SpecError(
            f"the decoder of {decoder.spec.family} {why_not_causal(decoder.spec)}, "
            "so it cannot be decoded step by step with a state"
        )
    future: State = {}
    return decoder(latents, past, future), future


def why_not_causal(spec: CoderSpec) -> str:
    """Why a coder cannot take a clip chunk by chunk, as the predicate of a sentence about it."""
    if spec.sees_whole_clip:
        return "sees whole clips (by norms over all their frames)"
    return "sees frames ahead (its kernels are centred in time)"


def decode_in_steps(
    spec: DecoderSpec, latents: Float[Tensor, "B C T Hz Wz"], chunk: int, step: Step
) -> Iterator[Float[Tensor, "B 3 F H W"]]:
    """Yield the frames of raw latents, not clamped, as `step` decodes the windows of `latent_windows` in order.

    Args:
        chunk: latent frames per step, ≥ 1; ignored for a decoder that sees whole clips.
    """
    blender = Blender()
    for window in latent_windows(spec, latents.shape[2], chunk):
        first = window.start == 0 or not spec.is_causal
        last = window.stop == latents.shape[2] or not spec.is_causal
        yield blender.frames(step(latents[:, :, window.start : window.stop], first=first, last=last), window)


def decode(
    decoder: Decoder, latents: Float[Tensor, "B C T Hz Wz"], *, chunk: int | None = None
) -> Float[Tensor, "B 3 F H W"]:
    """Decode raw latents to frames in [-1, 1], with the decoder as it is: its dtype, layout and gradients.

    Args:
        chunk: latent frames per step; None: all at once (fastest on short clips, most memory). A decoder that sees
            frames ahead computes those around a chunk twice, one that sees whole clips takes tiles of its own length.
    Raises:
        SpecError: the latents do not have the decoder's channels, or `chunk` is below 1.
    """
    check_latents(decoder.spec, latents)
    if chunk is not None and chunk < 1:
        raise SpecError(f"a chunk holds at least 1 latent frame, not {chunk}")
    past: State | None = None

    def step(latents: Tensor, *, first: bool, last: bool) -> Tensor:
        nonlocal past
        if last:
            return decoder(latents, past)
        frames, past = decode_step(decoder, latents, past)
        return frames

    steps = decode_in_steps(decoder.spec, latents, chunk or latents.shape[2], step)
    return torch.cat([frames.clamp(-1.0, 1.0) for frames in steps], dim=2)


def frame_chunks(
    pixels: Float[Tensor, "B 3 F H W"], *, temporal_factor: int, chunk: int
) -> Iterator[Float[Tensor, "B 3 f H W"]]:
    """Split a video on latent borders: 1 + k (chunk - 1) frames first, then k chunk, k = `temporal_factor`."""
    first = 1 + temporal_factor * (chunk - 1)
    yield pixels[:, :, :first]
    for start in range(first, pixels.shape[2], temporal_factor * chunk):
        yield pixels[:, :, start : start + temporal_factor * chunk]


def encode_step(
    encoder: Encoder, pixels: Float[Tensor, "B 3 f H W"], past: State | None
) -> tuple[Float[Tensor, "B C t Hz Wz"], State]:
    """Encode one chunk (as `frame_chunks` cuts them) to raw latents, the posterior's mean; returns the next state.

    Raises:
        SpecError: the frames have another number of axes, the chunk is not cut on a latent border, its sides are no
            multiples of the spatial factor, or it is not the first and the encoder sees frames ahead or whole clips:
            such an encoder takes a video at once.
    """
    if pixels.ndim != 5 or 0 in pixels.shape:
        raise SpecError(f"the encoder takes frames [B, 3, F, H, W], got {list(pixels.shape)}")
    if past is not None and not encoder.spec.is_causal:
        raise SpecError(
            f"the encoder of {encoder.spec.family} {why_not_causal(encoder.spec)}, "
            "so it takes a video at once, not in chunks"
        )
    kt, ks = encoder.spec.temporal_factor, encoder.spec.spatial_factor
    extra = (pixels.shape[2] - 1) % kt if past is None else pixels.shape[2] % kt
    if extra or pixels.shape[3] % ks or pixels.shape[4] % ks:
        raise SpecError(
            f"the encoder takes 1 + {kt} n frames (then {kt} n) with sides that {ks} divides, "
            f"got {list(pixels.shape[2:])}: pad the clip first"
        )
    future: State = {}
    if encoder.spec.sees_whole_clip:
        return encode_in_tiles(encoder, encoder.spec, pixels)[:, : encoder.spec.latent_width], future
    moments = encoder(pixels, past, future)
    return moments[:, : encoder.spec.latent_width], future


def encode(
    encoder: Encoder, pixels: Float[Tensor, "B 3 F H W"], *, chunk: int | None = None
) -> Float[Tensor, "B C T Hz Wz"]:
    """Encode frames in [-1, 1] to raw latents.

    Args:
        chunk: latent frames at a time; None: all at once. Encoders that see frames ahead always take all at once, those
            that see whole clips take tiles of their own length.
    """
    kt = encoder.spec.temporal_factor
    chunks = (
        [pixels]
        if chunk is None or not encoder.spec.is_causal
        else frame_chunks(pixels, temporal_factor=kt, chunk=chunk)
    )
    latents: list[Tensor] = []
    past: State | None = None
    for part in chunks:
        encoded, past = encode_step(encoder, part, past)
        latents.append(encoded)
    return torch.cat(latents, dim=2)
