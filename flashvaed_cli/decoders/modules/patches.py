"""Pixels as channels: `patch` x `patch` pixels of a frame become one position of a coarser grid, and back.

The channel of colour c at row i and column j of a patch is (c * patch + j) * patch + i: columns before rows.
Reference: Wan 2.2 and LTX-Video, which have the same order.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def patchify(pixels: Float[Tensor, "B C T H W"], patch: int) -> Float[Tensor, "B Cp T Hp Wp"]:
    """`[B, C, T, H, W]` to `[B, C * patch², T, H / patch, W / patch]`."""
    if patch == 1:
        return pixels
    cells = pixels.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # [B, C, T, Hp, i, Wp, j]
    return cells.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchify(x: Float[Tensor, "B Cp T Hp Wp"], patch: int) -> Float[Tensor, "B C T H W"]:
    """Undo `patchify`."""
    if patch == 1:
        return x
    cells = x.unflatten(1, (-1, patch, patch))  # [B, C, j, i, T, Hp, Wp]
    return cells.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
