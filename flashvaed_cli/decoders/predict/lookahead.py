"""Chunks for decoders that see frames ahead: how many latents around a chunk its frames depend on.

A decoder that is centred in time has no state to hand on. It runs on windows of latents instead: a chunk with as many
latents on both sides as its frames reach, worked out from the spec, block by block from the frames back to the
latents. What a window's own borders spoil lies outside the frames that are kept; at the video's borders there is
nothing to spoil, since there the padding is the decoder's. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flashvaed_cli.decoders.spec.blocks import BlockSpec
from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec

_FAR = 1 << 20  # a latent so far from a video's beginning that no rounding differs from its neighbours'


@dataclass(frozen=True)
class LatentWindow:
    """Latents `start:stop` are decoded as if they were a video; its frames `keep_start:keep_stop` are the chunk's."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int


def time_halo(spec: DecoderSpec) -> tuple[int, int]:
    """Latents before and behind a chunk that its frames depend on; a causal decoder needs none behind."""
    first, last = _latents_of(spec, *_frames_of(spec, _FAR, _FAR + 1))
    return _FAR - first, last - _FAR


def window_of(spec: DecoderSpec, start: int, stop: int, num_latents: int | None = None) -> LatentWindow:
    """The window of the chunk `start:stop` in a video of `num_latents` (None: its end is farther than the halo)."""
    first, last = _frames_of(spec, start, stop)
    before, behind = time_halo(spec)
    begin, end = max(start - before, 0), stop + behind
    offset = begin * spec.temporal_factor
    end = end if num_latents is None else min(end, num_latents)
    return LatentWindow(begin, end, first - offset, last + 1 - offset)


def latent_windows(spec: DecoderSpec, num_latents: int, chunk: int) -> Iterator[LatentWindow]:
    """A window for every chunk of a video."""
    for start in range(0, num_latents, chunk):
        yield window_of(spec, start, min(start + chunk, num_latents), num_latents)


def widest_window(spec: DecoderSpec, num_latents: int, chunk: int) -> int:
    """Latents of the largest window; the chunk itself where the decoder is causal."""
    if spec.is_causal:
        return min(chunk, num_latents)
    return min(sum(time_halo(spec)) + chunk, num_latents)


def _frames_of(spec: CoderSpec, start: int, stop: int) -> tuple[int, int]:
    """First and last frame that the latents `start:stop` stand for."""
    factor = spec.temporal_factor
    return (0 if start == 0 else factor * (start - 1) + 1), factor * (stop - 1)


def _latents_of(spec: CoderSpec, first: int, last: int) -> tuple[int, int]:
    """First and last latent that the frames `first` to `last` depend on, were the video endless on both sides.

    A window begins a video of its own, of which the frames before the last of a cell are dropped: what a block must
    give therefore begins at a frame that the window has too.
    """
    for _, block in reversed(list(spec.blocks())):
        growth = block.growth[0]
        first, last = first // growth, -(-last // growth)
        past, ahead = _reach(block)
        first, last = first - past, last + ahead
    return first, last


def _reach(block: BlockSpec) -> tuple[int, int]:
    """Frames before and behind a position of a block's input that its output depends on."""
    paths = [[block.layers[name] for name in path] for path in block.paths]
    past = max(sum(layer.num_past for layer in path) for path in paths)
    return past, max(sum(layer.num_ahead for layer in path) for path in paths)
