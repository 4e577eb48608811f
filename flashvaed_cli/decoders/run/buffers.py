"""Clips that come in parts, for decoders without a state: latents are held until they fill a window."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.predict.lookahead import LatentWindow, clip_windows, next_tile, time_halo, window_of
from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec


class Held:
    """The latents or frames of a clip that are still needed, by their place in the clip; joined only when read."""

    def __init__(self) -> None:
        self._parts: deque[Tensor] = deque()
        self._start = 0  # place of the first that is held
        self.stop = 0

    def add(self, part: Float[Tensor, "B C t H W"]) -> None:
        """Append the next part; it is not copied."""
        self._parts.append(part)
        self.stop += part.shape[2]

    def between(self, start: int, stop: int) -> Float[Tensor, "B C n H W"]:
        """Those from `start` up to `stop`; a view if they lie in one part."""
        pieces, offset = [], self._start
        for part in self._parts:
            piece = part[:, :, max(start - offset, 0) : max(stop - offset, 0)]
            pieces += [piece] if piece.shape[2] else []
            offset += part.shape[2]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)

    def drop_before(self, start: int) -> None:
        """Let go of the parts that end at or before `start`."""
        while self._parts and self._start + self._parts[0].shape[2] <= start:
            self._start += self._parts.popleft().shape[2]

    @property
    def num_held(self) -> int:
        """Latents or frames that are held."""
        return self.stop - self._start


class WindowBuffer:
    """For a decoder that sees frames ahead: parts are joined to chunks, whose windows go out once they are complete.

    Holds what the next windows need, never the whole video.
    """

    def __init__(self, spec: DecoderSpec, chunk: int = 1) -> None:
        """`chunk`: latents that a window is for, at least; fewer at the end of the video only."""
        self._spec, self._chunk = spec, chunk
        self._ahead = time_halo(spec)[1]
        self.held = Held()
        self._waiting: deque[tuple[int, int]] = deque()

    def push(self, part: Float[Tensor, "B C t Hz Wz"]) -> Iterator[tuple[Float[Tensor, "B C n Hz Wz"], LatentWindow]]:
        """Read a part; yield the windows that are complete now, each with its latents."""
        start, stop = self.held.stop, self.held.stop + part.shape[2]
        if self._waiting and not self._is_full(self._waiting[-1]):
            start, _ = self._waiting.pop()
        self._waiting.append((start, stop))
        self.held.add(part.clone())  # the caller may write into it again
        while self._waiting and self._is_full(self._waiting[0]) and self._waiting[0][1] + self._ahead <= stop:
            yield self._next()

    def finish(self) -> Iterator[tuple[Float[Tensor, "B C n Hz Wz"], LatentWindow]]:
        """Yield the remaining windows: the video has ended."""
        while self._waiting:
            yield self._next()

    def _is_full(self, span: tuple[int, int]) -> bool:
        return span[1] - span[0] >= self._chunk

    def _next(self) -> tuple[Tensor, LatentWindow]:
        window = window_of(self._spec, *self._waiting.popleft(), num_latents=self.held.stop)
        self.held.drop_before(window.start)
        return self.held.between(window.start, window.stop), window


class TileBuffer:
    """For a decoder that sees whole clips: a tile goes out as soon as no later latent can change it.

    Holds what the next tiles need, which without tiles is the whole clip.
    """

    def __init__(self, spec: CoderSpec) -> None:
        self._tiles = spec.temporal_tiles
        self._factor = spec.temporal_factor
        self._start = 0  # of the next tile
        self.held = Held()

    def push(self, part: Float[Tensor, "B C t Hz Wz"]) -> Iterator[tuple[Float[Tensor, "B C n Hz Wz"], LatentWindow]]:
        """Read a part; yield the tiles that are settled now, each with its latents."""
        self.held.add(part.clone())  # the caller may write into it again
        tiles = self._tiles
        if tiles is None:
            return
        for window in clip_windows(tiles, self.held.stop, self._factor, start=self._start):
            is_last = next_tile(tiles, window.start, self.held.stop) is None
            if window.stop - window.start < tiles.length or (tiles.overlap and is_last):
                return  # it may grow, or share frames with a tile after it
            self._start = window.start + tiles.stride
            yield self._latents_of(window), window

    def finish(self) -> Iterator[tuple[Float[Tensor, "B C n Hz Wz"], LatentWindow]]:
        """Yield the remaining tiles: the clip has ended."""
        if self._start < self.held.stop:
            for window in clip_windows(self._tiles, self.held.stop, self._factor, start=self._start):
                yield self._latents_of(window), window

    def _latents_of(self, window: LatentWindow) -> Tensor:
        self.held.drop_before(window.start)
        return self.held.between(window.start, window.stop)


def buffer_of(spec: DecoderSpec, chunk: int = 1) -> WindowBuffer | TileBuffer:
    """The buffer for a decoder that is not causal; `chunk` is that of a `WindowBuffer`."""
    return TileBuffer(spec) if spec.sees_whole_clip else WindowBuffer(spec, chunk)


def frames_of_parts(
    spec: CoderSpec, sizes: deque[int], frames: Iterable[Float[Tensor, "B 3 _f H W"]]
) -> Iterator[Float[Tensor, "B 3 _F H W"]]:
    """Regroup the frames of a clip into those of each of its parts.

    Args:
        sizes: latents of each part read so far; more may be appended while frames are taken.
        frames: of the whole clip, in any grouping.
    """
    held, start = Held(), 0
    missing = spec.temporal_factor - 1  # the first latent of a clip stands for a single frame
    for given in frames:
        held.add(given)
        while sizes and held.stop >= (stop := start + spec.temporal_factor * sizes[0] - missing):
            yield held.between(start, stop)
            held.drop_before(stop)
            start, missing = stop, 0
            sizes.popleft()
