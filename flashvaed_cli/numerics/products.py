"""Products of float32 matrices at the processor's full rate.

torch multiplies matrices with MKL, which leaves half of each vector register of AMD's processors unused: 220 GFLOP/s
on two cores of an EPYC with AVX-512, where the convolutions, which come from oneDNN, reach 450 to 500 (torch 2.14).
There, rows are multiplied by a 1x1 convolution, which is the same sum. Everywhere else, and for gradients, graphs,
other number formats and small matrices, this is torch's own product.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

FEWEST_MULTIPLIES = 1 << 22
"""Below these a product takes no longer than the call."""


class RowLinear(nn.Linear):
    """A linear layer of many rows."""

    def forward(self, input: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows O"]:
        return linear(input, self.weight, self.bias)


def linear(
    x: Float[Tensor, "*rows C"], weight: Float[Tensor, "O C"], bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "*rows O"]:
    """`torch.nn.functional.linear`."""
    if not is_faster_by_convolution(x, x.numel() * weight.shape[0]):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    return by_convolution(rows, weight, bias).view(*x.shape[:-1], -1)


def is_faster_by_convolution(x: Float[Tensor, "*rows C"], num_multiplies: int) -> bool:
    """Whether rows like these, in a product of so many multiplications, are multiplied faster by `by_convolution`."""
    return (
        num_multiplies >= FEWEST_MULTIPLIES
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and products_are_slow()
    )


@cache
def products_are_slow() -> bool:
    """Whether this is a processor on which torch's convolutions multiply twice as fast as its matrix products."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and _vendor() == "AuthenticAMD"


def _vendor() -> str:
    """The processor's vendor as Linux names it; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def by_convolution(
    rows: Float[Tensor, "M K"], weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None = None
) -> Float[Tensor, "M N"]:
    """Rows times a transposed matrix, plus a bias: all as an image one pixel high with its channels innermost.

    A kernel of 1x1 cannot be dilated, but torch on one thread uses oneDNN for it only then.
    """
    num_outputs, width = weight.shape
    kernel = weight.contiguous().as_strided((num_outputs, width, 1, 1), (width, 1, width, width))
    image = rows.contiguous()[None, None].permute(0, 3, 1, 2)  # [1, K, 1, M]
    return F.conv2d(image, kernel, bias, dilation=2)[0].permute(1, 2, 0)[0]
