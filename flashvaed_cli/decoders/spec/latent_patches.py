"""Latent statistics per channel, or per channel and place in patches of 2x2.

FLUX.2's diffusion models take patches of 2x2 latents as 4 C channels and normalise each of these, so a latent's mean
and deviation depend on whether its row and column are even. Decoders take the C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

PATCH = 2


def are_per_place(num_figures: int, latent_width: int) -> bool:
    """Whether so many figures are one for each channel of 2x2 patches, not one for each latent channel."""
    return num_figures == latent_width * PATCH**2


def per_channel(
    mean: Sequence[float], std: Sequence[float], latent_width: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, over all places of a patch."""
    if not are_per_place(len(mean), latent_width):
        return tuple(mean), tuple(std)
    places, pooled = PATCH**2, []
    for first in range(0, len(mean), places):
        means, deviations = mean[first : first + places], std[first : first + places]
        centre = sum(means) / places
        variance = sum(s**2 + (m - centre) ** 2 for m, s in zip(means, deviations, strict=True)) / places
        pooled.append((centre, math.sqrt(variance)))
    return tuple(one for one, _ in pooled), tuple(one for _, one in pooled)


def per_place(figures: Sequence[float], num_figures: int) -> tuple[float, ...]:
    """One figure for each channel of patches, repeated if there is one for each latent channel."""
    times = num_figures // len(figures)
    return tuple(figure for figure in figures for _ in range(times))
