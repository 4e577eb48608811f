"""Gains of normalisation layers by least squares."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

_DEAD_SHARE = 1e-12


def fit_gain(
    target_dot_input: Float[Tensor, " C"],
    input_dot_input: Float[Tensor, " C"],
    *,
    prior: Float[Tensor, " C"] | None = None,
) -> Float64[Tensor, " C"]:
    """Per-channel gain through zero: gamma = <y, x> / <x, x> minimises ||gamma x - y||².

    Needed after pruning, because the RMS over the kept channels differs from that over all.

    Dead channels: where <x, x> is zero, or below 1e-12 of the largest, the data say nothing about
    the gain. They keep `prior`, or get 1 without one.

    Args:
        target_dot_input: sum over positions of the original's output times the normalised input.
        input_dot_input: sum over positions of the normalised input squared.
        prior: gains for dead channels, usually the original's.
    Returns:
        gamma, float64.
    """
    energy = input_dot_input.detach().double()
    fallback = torch.ones_like(energy) if prior is None else prior.detach().to(energy)
    alive = energy > _DEAD_SHARE * energy.max()
    return torch.where(alive, target_dot_input.detach().double() / torch.where(alive, energy, 1.0), fallback)
