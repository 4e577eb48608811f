"""Which latents each step of a clip reads, and which of its frames it keeps.

A causal decoder passes a state on and reads the chunk alone. A decoder that is centred in time has no state: it runs on
a window, the chunk with as many latents on both sides as its frames depend on, worked out from the spec, block by block
from the frames back to the latents. Frames that a window's own borders spoil are not kept; at the video's borders
nothing is spoilt, since the padding there is the decoder's.

The frames of a decoder that sees whole clips depend on all latents. Its windows are the tiles that its spec cuts longer
clips into; where these overlap, their frames are blended. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flashvaed_cli.decoders.spec.blocks import BlockSpec
from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec, TemporalTiles

_USUAL_CHUNK = 4
_FAR = 1 << 20  # a latent so far from the video's start that rounding is the same as for its neighbours


@dataclass(frozen=True)
class LatentWindow:
    """Latents `start:stop` are read; of their frames, `keep_start:keep_stop` are the chunk's.

    The next window has `num_blended` frames after those too; they are blended into its first ones.
    """

    start: int
    stop: int
    keep_start: int
    keep_stop: int
    num_blended: int = 0


def time_halo(spec: DecoderSpec) -> tuple[int, int]:
    """Latents before and after a chunk that its frames depend on; a causal decoder needs none after it."""
    first, last = _latents_of(spec, *_frames_of(spec, _FAR, _FAR + 1))
    return _FAR - first, last - _FAR


def usual_chunk(spec: DecoderSpec) -> int:
    """Latents of a step of a clip whose frames are not kept: larger steps gain little.

    A decoder that sees frames ahead reads its halo with every step. With as many latents between, it decodes a clip at
    most twice, in at most twice the memory of the smallest step.
    """
    return max(_USUAL_CHUNK, least_useful_chunk(spec))


def least_useful_chunk(spec: DecoderSpec) -> int:
    """Latents of a step below which smaller ones take hardly less memory: the halo, which is read with each."""
    return 1 if spec.is_causal or spec.sees_whole_clip else max(1, sum(time_halo(spec)))


def window_of(spec: DecoderSpec, start: int, stop: int, num_latents: int | None = None) -> LatentWindow:
    """The window of the chunk `start:stop` in a video of `num_latents` (None: it ends beyond the halo)."""
    first, last = _frames_of(spec, start, stop)
    before, after = time_halo(spec)
    begin, end = max(start - before, 0), stop + after
    offset = begin * spec.temporal_factor
    end = end if num_latents is None else min(end, num_latents)
    return LatentWindow(begin, end, first - offset, last + 1 - offset)


def first_chunk(num_latents: int, chunk: int) -> int:
    """Latents of a causal decoder's first step: those that fill no chunk, so that all later steps have one shape."""
    return (num_latents - 1) % chunk + 1


def chunk_spans(num_latents: int, chunk: int) -> Iterator[tuple[int, int]]:
    """First latent and end of each step of a causal decoder."""
    start, stop = 0, first_chunk(num_latents, chunk)
    while start < num_latents:
        yield start, stop
        start, stop = stop, stop + chunk


def latent_windows(spec: DecoderSpec, num_latents: int, chunk: int) -> Iterator[LatentWindow]:
    """The schedule of a clip: the window of each step. A causal decoder reads the chunk alone, one that sees frames
    ahead also those around it, and one that sees whole clips a tile of its own length."""
    if spec.is_causal:
        for start, stop in chunk_spans(num_latents, chunk):
            first, last = _frames_of(spec, start, stop)
            yield LatentWindow(start, stop, 0, last + 1 - first)
    elif spec.sees_whole_clip:
        yield from clip_windows(spec.temporal_tiles, num_latents, spec.temporal_factor)
    else:
        for start in range(0, num_latents, chunk):
            yield window_of(spec, start, min(start + chunk, num_latents), num_latents)


def widest_window(spec: DecoderSpec, num_latents: int, chunk: int) -> int:
    """Latents of the largest window; the chunk itself if the decoder is causal."""
    if spec.is_causal:
        return min(chunk, num_latents)
    if spec.sees_whole_clip:
        return latents_per_step(spec, num_latents, chunk)
    return min(sum(time_halo(spec)) + chunk, num_latents)


def latents_per_step(spec: DecoderSpec, num_latents: int, chunk: int) -> int:
    """The latents of a step: the chunk, unless the decoder sees whole clips; then its tile, or the clip."""
    if spec.sees_whole_clip:
        chunk = num_latents if spec.temporal_tiles is None else spec.temporal_tiles.length
    return min(chunk, num_latents)


def clip_windows(
    tiles: TemporalTiles | None, num_latents: int, factor: int, *, start: int = 0
) -> Iterator[LatentWindow]:
    """The tiles of a clip from the one at `start` on; without tiles, the clip.

    Args:
        factor: frames that a latent stands for, all but the first of a clip.
    """
    stop = num_latents if tiles is None else min(start + tiles.length, num_latents)
    while (following := next_tile(tiles, start, num_latents)) is not None:
        yield tile_window(tiles, start, stop, factor, is_last=False)
        start, stop = following
    yield tile_window(tiles, start, stop, factor, is_last=True)


def next_tile(tiles: TemporalTiles | None, start: int, num_latents: int) -> tuple[int, int] | None:
    """Start and stop of the tile after the one at `start`; None if that one already has all remaining frames."""
    if tiles is None:
        return None
    following = start + tiles.stride
    given = following + min(tiles.overlap, 1)  # the first latent of an overlapping tile yields no frame
    return (following, min(following + tiles.length, num_latents)) if given < num_latents else None


def tile_window(tiles: TemporalTiles | None, start: int, stop: int, factor: int, *, is_last: bool) -> LatentWindow:
    """The window of a tile: all its frames, less those that the tiles around it keep."""
    num_frames = 1 + factor * (stop - start - 1)
    if tiles is None:
        return LatentWindow(start, stop, 0, num_frames)
    shared = min(tiles.overlap, 1)
    keep_start = shared if start else 0
    if is_last:
        return LatentWindow(start, stop, keep_start, num_frames)
    num_blended = factor * max(tiles.overlap - 1, 0)
    return LatentWindow(start, stop, keep_start, factor * tiles.stride + shared, num_blended)


def _frames_of(spec: CoderSpec, start: int, stop: int) -> tuple[int, int]:
    """First and last frame that the latents `start:stop` stand for."""
    factor = spec.temporal_factor
    return (0 if start == 0 else factor * (start - 1) + 1), factor * (stop - 1)


def _latents_of(spec: CoderSpec, first: int, last: int) -> tuple[int, int]:
    """First and last latent that the frames `first` to `last` depend on, in a video without ends.

    A window is a video of its own, which lacks all but the last frame of its first cell: the frames that a block must
    provide therefore begin at one that the window has too.
    """
    for _, block in reversed(list(spec.blocks())):
        growth = block.growth[0]
        first, last = first // growth, -(-last // growth)
        past, ahead = _reach(block)
        first, last = first - past, last + ahead
    return first, last


def _reach(block: BlockSpec) -> tuple[int, int]:
    """Frames before and after a position of a block's input that its output depends on."""
    paths = [[block.layers[name] for name in path] for path in block.paths]
    past = max(sum(layer.num_past for layer in path) for path in paths)
    return past, max(sum(layer.num_ahead for layer in path) for path in paths)
