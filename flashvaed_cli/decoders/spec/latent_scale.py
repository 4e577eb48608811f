"""From normalized latents to raw ones and back: statistics per channel, or per channel and place in patches of 2x2.

FLUX.2's diffusion models take patches of 2x2 latents as 4 C channels and normalise each of these, so a latent's mean
and deviation depend on whether its row and column are even. Decoders take the C channels themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

PATCH = 2


def are_per_place(num_figures: int, latent_width: int) -> bool:
    """Whether that many figures are one for each channel of 2x2 patches, rather than one for each channel."""
    return num_figures == latent_width * PATCH**2


def unpatched(latents: Float[Tensor, "B P T Hp Wp"]) -> Float[Tensor, "B C T Hz Wz"]:
    """Patches of 2x2 latents, as the channels (C, row, column), side by side again."""
    batch, width, num_latents, height, columns = latents.shape
    parts = latents.reshape(batch, width // PATCH**2, PATCH, PATCH, num_latents, height, columns)
    placed = parts.permute(0, 1, 4, 5, 2, 6, 3)  # [B, C, T, Hp, row, Wp, column]
    return placed.reshape(batch, width // PATCH**2, num_latents, height * PATCH, columns * PATCH)


def figures_over(
    figures: Sequence[float], like: Float[Tensor, "B C T Hz Wz"]
) -> Float[Tensor, "C 1 1 1"] | Float[Tensor, "C 1 Hz Wz"]:
    """Means or deviations in the shape that latents are scaled with, float32 and on their device."""
    latent_width, height, columns = like.shape[1], like.shape[-2], like.shape[-1]
    row = torch.tensor(figures, device=like.device)
    if not are_per_place(len(figures), latent_width):
        return row.view(-1, 1, 1, 1)
    places = row.view(latent_width, 1, PATCH, PATCH)
    repeats = math.ceil(height / PATCH), math.ceil(columns / PATCH)
    return places.repeat(1, 1, *repeats)[..., :height, :columns]


def per_channel(
    mean: Sequence[float], std: Sequence[float], latent_width: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, over all places of a patch."""
    if not are_per_place(len(mean), latent_width):
        return tuple(mean), tuple(std)
    means, deviations = (torch.tensor(row, dtype=torch.float64).view(latent_width, -1) for row in (mean, std))
    pooled = (deviations**2).mean(1) + means.var(1, unbiased=False)
    return tuple(means.mean(1).tolist()), tuple(pooled.sqrt().tolist())


def per_place(figures: Sequence[float], num_figures: int) -> tuple[float, ...]:
    """One figure for each channel of patches, from those or from one for each latent channel."""
    times = num_figures // len(figures)
    return tuple(figure for figure in figures for _ in range(times))
