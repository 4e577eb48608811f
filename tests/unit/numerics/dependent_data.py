"""Rows of dependent channels, and what brute-force least squares makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dependent_rows(seed: int, width: int, rank: int, noise: float = 0.05) -> Tensor:
    """`[200, width]` of a rank, plus noise, around means of 0, 1, 2, ..."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(200, rank, generator=generator, dtype=torch.float64)
    mixing = torch.randn(rank, width, generator=generator, dtype=torch.float64)
    noise_rows = torch.randn(200, width, generator=generator, dtype=torch.float64)
    return factors @ mixing + noise * noise_rows + torch.arange(width, dtype=torch.float64)


def covariance_of(rows: Tensor) -> Tensor:
    """Population covariance."""
    centred = rows - rows.mean(dim=0)
    return centred.T @ centred / len(rows)


def brute_force_r2(rows: Tensor, kept: Sequence[int]) -> float:
    """R² of all channels given the kept ones, by least squares on the rows."""
    centred = rows - rows.mean(dim=0)
    fitted = centred[:, kept] @ torch.linalg.lstsq(centred[:, kept], centred, driver="gelsd").solution
    return 1.0 - float((centred - fitted).square().sum() / centred.square().sum())
