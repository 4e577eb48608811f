"""The check that every export passes: the exported decoder's frames against the decoder's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.run.latent_scale import figures_over
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.errors import ExportError

ROUNDING_FACTOR = 8.0
"""A decoder's export may differ from it by this many times the decoder's own rounding.

A norm over few channels meets vectors near zero and magnifies the rounding of whatever comes before it: float32 then
no longer gives four digits, in PyTorch or anywhere else. For toy students with two and three channels in a norm,
float32 in PyTorch is 1.1e-6 to 1.8e-3 of the range from float64, and onnxruntime 0.2 to 4.7 times that from PyTorch."""
_FINER = {torch.float16: torch.float32, torch.float32: torch.float64}


def seeded_latents(
    spec: DecoderSpec,
    grid: tuple[int, int, int],
    *,
    seed: int = 0,
    latent_mean: Sequence[float] | None = None,
    latent_std: Sequence[float] | None = None,
    batch: int = 1,
) -> Float[Tensor, "B C Tz Hz Wz"]:
    """Random raw latents: normal per channel, with the family's mean and deviation where they are given.

    Args:
        grid: latent frames, height and width.
    """
    generator = torch.Generator().manual_seed(seed)
    normalized = torch.randn(batch, spec.latent_width, *grid, generator=generator)
    mean = (0.0,) * spec.latent_width if latent_mean is None else latent_mean
    std = (1.0,) * spec.latent_width if latent_std is None else latent_std
    return normalized * figures_over(std, normalized) + figures_over(mean, normalized)


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


@torch.no_grad()
def own_rounding(decoder: Decoder, latents: Float[Tensor, "B C Tz Hz Wz"], dtype: torch.dtype = torch.float32) -> float:
    """How far a decoder in `dtype` is from itself in the next finer format, measured by `relative_difference`."""
    frames = [decode(copy_in(decoder, kind), latents.to("cpu", kind)) for kind in (dtype, _FINER[dtype])]
    return relative_difference(*frames)


def copy_in(decoder: Decoder, dtype: torch.dtype) -> Decoder:
    """A copy on the CPU, for inference, in another number format."""
    copy = Decoder(decoder.spec).to(dtype).eval().requires_grad_(False)
    copy.load_state_dict(decoder.state_dict())
    return copy


def require_parity(
    difference: float, tolerance: float, *, where: str, rounding: Callable[[], float] | None = None, advice: str = ""
) -> float:
    """Return what is allowed: `tolerance`, or `ROUNDING_FACTOR` times the decoder's own rounding if that is more.

    Args:
        rounding: returns the decoder's own rounding; called only if `difference` is above `tolerance`.
        advice: what the user can do.
    Raises:
        ExportError: `difference` is larger, or NaN.
    """
    if difference <= tolerance:
        return tolerance
    own = 0.0 if rounding is None else rounding()
    allowed = max(tolerance, ROUNDING_FACTOR * own)
    if difference <= allowed:
        return allowed
    of_rounding = "" if rounding is None else f"; rounding alone moves the decoder by {own:.2g}"
    raise ExportError(
        f"{where} differs from the decoder by {difference:.2g} of the range of its frames "
        f"(tolerance {allowed:.2g}{of_rounding}), so it was not written{advice and f'. {advice}'}"
    )
