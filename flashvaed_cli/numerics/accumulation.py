"""Float64 sums of products: the arithmetic that every accumulated statistic shares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from flashvaed_cli.errors import CalibrationError

_BLOCK_BYTES = 128 * 2**20
_PANEL_WIDTH = 1024


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """Run without autograd, autocast, TF32 or bfloat16 products, whatever the caller has switched on.

    Tensors made inside are ordinary ones even under `torch.inference_mode`, so that sums collected
    there can be updated elsewhere.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        _full_float32_products(),
    ):
        yield


@contextmanager
def _full_float32_products() -> Iterator[None]:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch before 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    # One backend at a time: the global switch cannot be read if a caller has set them differently.
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    settings = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, setting in zip(backends, settings, strict=True):
            backend.fp32_precision = setting


def accumulation_device(device: torch.device) -> torch.device:
    """The device that holds float64 sums of data on `device`: the same, or the CPU where it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def rows_per_block(num_features: int) -> int:
    """Rows of a float64 block of at most 128 MiB."""
    return max(64, min(8192, _BLOCK_BYTES // (8 * num_features)))


def require_finite(values: Float[Tensor, "*shape"], label: str) -> None:
    """Refuse NaN and infinity before they reach a sum.

    Raises:
        CalibrationError: naming `label`.
    """
    if values.numel() == 0 or bool(torch.isfinite(values.detach().sum())):
        return  # a sum with NaN or infinity in it is not finite; the reverse may fail, by overflow
    low, high = torch.aminmax(values.detach())
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise CalibrationError(
            f"{label}: NaN or infinite values. Check the weights and the clips, or calibrate in float32 instead of "
            "half precision."
        )


def add_upper_gram_(gram: Float64[Tensor, "K K"], block: Float64[Tensor, "N K"]) -> None:
    """Add XᵀX to the upper triangle of `gram`, panel by panel.

    Half the products of a full update, and a temporary of one panel instead of K x K. The part below
    the diagonal is left undefined; see `mirror_upper_`.
    """
    for start in range(0, gram.shape[0], _PANEL_WIDTH):
        stop = start + _PANEL_WIDTH
        gram[start:stop, start:] += block[:, start:stop].T @ block[:, start:]


def mirror_upper_(gram: Float64[Tensor, "K K"]) -> None:
    """Copy the upper triangle over the lower one, in place."""
    for start in range(0, gram.shape[0], _PANEL_WIDTH):
        stop = start + _PANEL_WIDTH
        corner = gram[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        gram[stop:, start:stop] = gram[start:stop, stop:].T


def add_outer_(
    matrix: Float64[Tensor, "M N"], left: Float64[Tensor, " M"], right: Float64[Tensor, " N"], scale: float | int
) -> None:
    """Add `scale * left rightᵀ` in place, without a temporary of the matrix's size."""
    matrix.addr_(left, right, alpha=scale)
