"""Tiles in time, for coders that see whole clips: frames that two tiles share are blended.

`predict/lookahead.py` works out which latents and frames belong to which tile.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.predict.lookahead import LatentWindow, clip_windows
from flashvaed_cli.decoders.spec.coders import CoderSpec


class Blender:
    """Joins the frames of consecutive windows to those of one clip."""

    def __init__(self) -> None:
        self._shared: Tensor | None = None  # of the last window, beyond the frames that it keeps

    def frames(self, given: Float[Tensor, "B C f H W"], window: LatentWindow) -> Float[Tensor, "B C k H W"]:
        """The frames that a window keeps, blended with those of the window before; those given, or a copy of some."""
        kept = given[:, :, window.keep_start : window.keep_stop]
        if kept.shape[2] < given.shape[2]:
            kept = kept.clone()  # a view would keep the others alive
        if self._shared is not None:
            count = self._shared.shape[2]
            share = torch.arange(count, device=given.device, dtype=given.dtype).div(count).view(-1, 1, 1)
            kept[:, :, :count].mul_(share).add_(self._shared * (1 - share))
        stop = window.keep_stop + window.num_blended
        self._shared = given[:, :, window.keep_stop : stop].clone() if window.num_blended else None
        return kept


def encode_in_tiles(
    encoder: torch.nn.Module, spec: CoderSpec, pixels: Float[Tensor, "B 3 F H W"]
) -> Float[Tensor, "B M T Hz Wz"]:
    """The moments of a clip, its tiles encoded as clips of their own and blended as frames are."""
    blender, moments = Blender(), []
    for window in clip_windows(spec.temporal_tiles, spec.num_latents(pixels.shape[2]), 1):
        first, last = (spec.temporal_factor * latent for latent in (window.start, window.stop - 1))
        moments.append(blender.frames(encoder(pixels[:, :, first : last + 1]), window))
    return torch.cat(moments, dim=2)
