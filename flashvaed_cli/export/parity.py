"""The check that every export passes: the exported decoder's frames against the decoder's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.spec import DecoderSpec
from flashvaed_cli.errors import ExportError


def seeded_latents(
    spec: DecoderSpec,
    grid: tuple[int, int, int],
    *,
    seed: int = 0,
    latent_mean: Sequence[float] | None = None,
    latent_std: Sequence[float] | None = None,
) -> Float[Tensor, "B C Tz Hz Wz"]:
    """Random raw latents: normal per channel, with the family's mean and deviation where they are given.

    Args:
        grid: latent frames, height and width.
    """
    generator = torch.Generator().manual_seed(seed)
    normalized = torch.randn(1, spec.latent_width, *grid, generator=generator)
    mean = torch.zeros(spec.latent_width) if latent_mean is None else torch.tensor(latent_mean)
    std = torch.ones(spec.latent_width) if latent_std is None else torch.tensor(latent_std)
    return normalized * std.view(-1, 1, 1, 1) + mean.view(-1, 1, 1, 1)


def relative_difference(exported: Float[Tensor, "*S"], expected: Float[Tensor, "*S"]) -> float:
    """Largest absolute difference, as a fraction of the range of `expected` (of its magnitude if constant).

    Raises:
        ExportError: the shapes differ.
    """
    if exported.shape != expected.shape:
        raise ExportError(f"the export gives frames {list(exported.shape)}, the decoder {list(expected.shape)}")
    expected = expected.double()
    largest = (exported.double() - expected).abs().max()
    span = (expected.max() - expected.min()).item() or expected.abs().max().item() or 1.0
    return largest.item() / span


def require_parity(difference: float, tolerance: float, *, where: str) -> None:
    """Raise ExportError unless `difference` is a number and at most `tolerance`."""
    if not difference <= tolerance:
        raise ExportError(
            f"{where} differs from the decoder by {difference:.2g} of the range of its frames "
            f"(tolerance {tolerance:.2g}); nothing was written"
        )
