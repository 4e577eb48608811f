"""Clips of decoders that see whole clips: cut into tiles in time, whose frames are blended where two give them.

Which latents and frames are whose is worked out in `predict/lookahead.py`; here they are put together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.predict.lookahead import LatentWindow, clip_windows, next_tile, tile_window
from flashvaed_cli.decoders.spec.coders import CoderSpec, TemporalTiles


class Blender:
    """Frames of windows that follow each other as frames of one clip."""

    def __init__(self) -> None:
        self._shared: Tensor | None = None  # what the last window gave beyond its own frames

    def frames(self, given: Float[Tensor, "B C f H W"], window: LatentWindow) -> Float[Tensor, "B C k H W"]:
        """The kept frames of a window, blended into what the window before gave for them; part of `given`, in place."""
        kept = given[:, :, window.keep_start : window.keep_stop]
        if self._shared is not None:
            count = self._shared.shape[2]
            share = torch.arange(count, device=given.device, dtype=given.dtype).div(count).view(-1, 1, 1)
            kept[:, :, :count].mul_(share).add_(self._shared * (1 - share))
        stop = window.keep_stop + window.num_blended
        self._shared = given[:, :, window.keep_stop : stop].clone() if window.num_blended else None
        return kept


class TileBuffer:
    """Latents come in parts, tiles go out as soon as no later latent can change them.

    Holds what the next tiles need, which without tiles is the whole clip.
    """

    def __init__(self, spec: CoderSpec) -> None:
        self._tiles: TemporalTiles | None = spec.temporal_tiles
        self._factor = spec.temporal_factor
        self._held: Tensor | None = None
        self._start = self._read = 0  # of the next tile, and the first latent that is not read yet

    def push(self, part: Float[Tensor, "B C t Hz Wz"]) -> Iterator[tuple[Float[Tensor, "B C n Hz Wz"], LatentWindow]]:
        """Read a part; the latents of the tiles that it completes, and their windows."""
        self._held = part if self._held is None else torch.cat([self._held, part], dim=2)
        self._read += part.shape[2]
        tiles = self._tiles
        while tiles is not None and self._start + tiles.length <= self._read:
            if tiles.overlap and next_tile(tiles, self._start, self._read) is None:
                return  # whether its last frames are blended is not known yet
            window = tile_window(tiles, self._start, self._start + tiles.length, self._factor, is_last=False)
            yield self._held[:, :, : tiles.length], window
            self._held, self._start = self._held[:, :, tiles.stride :], self._start + tiles.stride

    def finish(self) -> Iterator[tuple[Float[Tensor, "B C n Hz Wz"], LatentWindow]]:
        """The tiles that are left: the clip has ended."""
        if self._held is None or self._start >= self._read:
            return
        while (following := next_tile(self._tiles, self._start, self._read)) is not None:
            assert self._tiles is not None
            stop = min(self._start + self._tiles.length, self._read)
            window = tile_window(self._tiles, self._start, stop, self._factor, is_last=False)
            yield self._held[:, :, : stop - self._start], window
            self._held, self._start = self._held[:, :, following[0] - self._start :], following[0]
        yield self._held, tile_window(self._tiles, self._start, self._read, self._factor, is_last=True)


def frames_of_parts(
    spec: CoderSpec, sizes: deque[int], frames: Iterable[Float[Tensor, "B 3 _f H W"]]
) -> Iterator[Float[Tensor, "B 3 _F H W"]]:
    """Frames as they come, cut anew into those of every part of a clip.

    Args:
        sizes: latents of the parts that were read so far; more may be added while frames are taken.
        frames: of the whole clip.
    """
    held: Tensor | None = None
    surplus = spec.temporal_factor - 1  # of the first latent, which stands for one frame
    for given in frames:
        held = given if held is None else torch.cat([held, given], dim=2)
        while sizes and held.shape[2] >= (wanted := spec.temporal_factor * sizes[0] - surplus):
            yield held[:, :, :wanted]
            held, surplus = held[:, :, wanted:], 0
            sizes.popleft()


def encode_in_tiles(
    encoder: torch.nn.Module, spec: CoderSpec, pixels: Float[Tensor, "B 3 F H W"]
) -> Float[Tensor, "B M T Hz Wz"]:
    """The moments of a clip whose tiles are encoded as clips of their own, the latents blended as frames are."""
    blender, moments = Blender(), []
    for window in clip_windows(spec.temporal_tiles, spec.num_latents(pixels.shape[2]), 1):
        first, last = (spec.temporal_factor * latent for latent in (window.start, window.stop - 1))
        moments.append(blender.frames(encoder(pixels[:, :, first : last + 1]), window))
    return torch.cat(moments, dim=2)
