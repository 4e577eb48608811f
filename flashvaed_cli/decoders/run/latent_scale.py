"""What turns normalized latents into raw ones: unpacked patches, means and deviations that broadcast over latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.spec.latent_patches import PATCH, are_per_place


def unpatched(latents: Float[Tensor, "B P T Hp Wp"]) -> Float[Tensor, "B C T Hz Wz"]:
    """Unpack patches of 2x2 latents, stored as channels (C, row, column)."""
    batch, width, num_latents, height, columns = latents.shape
    parts = latents.reshape(batch, width // PATCH**2, PATCH, PATCH, num_latents, height, columns)
    placed = parts.permute(0, 1, 4, 5, 2, 6, 3)  # [B, C, T, Hp, row, Wp, column]
    return placed.reshape(batch, width // PATCH**2, num_latents, height * PATCH, columns * PATCH)


def figures_over(
    figures: Sequence[float], like: Float[Tensor, "B C T Hz Wz"]
) -> Float[Tensor, "C 1 1 1"] | Float[Tensor, "C 1 Hz Wz"]:
    """Means or deviations in a shape that broadcasts over the latents; float32, on their device."""
    latent_width, height, columns = like.shape[1], like.shape[-2], like.shape[-1]
    row = torch.tensor(figures, device=like.device)
    if not are_per_place(len(figures), latent_width):
        return row.view(-1, 1, 1, 1)
    places = row.view(latent_width, 1, PATCH, PATCH)
    repeats = math.ceil(height / PATCH), math.ceil(columns / PATCH)
    return places.repeat(1, 1, *repeats)[..., :height, :columns]
