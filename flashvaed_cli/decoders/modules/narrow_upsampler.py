"""An upsampler that gives few channels: its two kernels as one, on frames that have not grown yet.

Nothing lies between `temporal`, which makes two frames of one, and the 3x3 kernel of `spatial` on enlarged frames. So
the nine taps of `spatial` are multiplied by the kernel of `temporal` first: 2 x 9 x O channels on the small frames,
and each output pixel is a sum of nine of them. That saves products where 9 O is less than C, which `temporal` gives
for each of both frames: after the last whole stage of a pruned decoder.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from flashvaed_cli.decoders.modules.exact_operators import sum_over_taps

Kernel = tuple[Float[Tensor, "K C kt 1 1"], Float[Tensor, " K"]]
"""Weight and bias; K is frames of one x 3 x 3 x O."""


def doubling_kernel(
    temporal: tuple[Float[Tensor, "C2 C kt 1 1"], Float[Tensor, " C2"]],
    spatial: tuple[Float[Tensor, "O C 3 3"], Float[Tensor, " O"]],
) -> Kernel:
    """`temporal`, then each tap of `spatial` on both frames that it makes; products in float32 at least."""
    weight, bias = (_precise(part.unflatten(0, (2, -1))) for part in temporal)  # [2, C, C, kt, 1, 1], [2, C]
    taps = _precise(_taps(spatial[0]))  # [9 O, C]
    products = torch.einsum("kc,pcdt->pkdt", taps, weight.flatten(3))  # [2, 9 O, C, kt]
    sums = bias @ taps.T + _bias_of_taps(_precise(spatial[1]))  # [2, 9 O]
    return products.flatten(0, 1)[..., None, None].to(spatial[0].dtype), sums.flatten().to(spatial[1].dtype)


def single_kernel(spatial: tuple[Float[Tensor, "O C 3 3"], Float[Tensor, " O"]]) -> Kernel:
    """Each tap of `spatial` on a frame that `temporal` leaves as it is."""
    return _taps(spatial[0])[..., None, None, None], _bias_of_taps(spatial[1])


def enlarged_sum(
    x: Float[Tensor, "B C T H W"],
    before: Float[Tensor, "B C P H W"] | None,
    kernel: Kernel,
    num_outputs: int,
) -> Float[Tensor, "B O F Hu Wu"]:
    """Frames of twice the size, as many of one as the kernel makes; channels innermost in memory.

    Args:
        before: the frames before `x` that the kernel reads; None: zeros.
    """
    b, h, w = x.shape[0], *x.shape[3:]
    products = sum_over_taps(x, before, *kernel)
    taps = products.permute(0, 2, 3, 4, 1).unflatten(4, (-1, 3, 3, num_outputs))  # [B, T, H, W, P, 3, 3, O]
    taps = taps.permute(0, 1, 4, 2, 3, 5, 6, 7).flatten(0, 2)  # [BTP, H, W, 3, 3, O]
    frames = taps.shape[0]
    # Of the rows 2 y and 2 y + 1, the taps above, at and below read the small rows y - 1, y, y and y, y, y + 1.
    rows = taps.new_empty(frames, h, 2, w, 3, num_outputs)
    torch.add(taps[:, :, :, 1], taps[:, :, :, 2], out=rows[:, :, 0])
    rows[:, 1:, 0] += taps[:, :-1, :, 0]
    torch.add(taps[:, :, :, 0], taps[:, :, :, 1], out=rows[:, :, 1])
    rows[:, :-1, 1] += taps[:, 1:, :, 2]
    y = taps.new_empty(frames, h, 2, w, 2, num_outputs)
    torch.add(rows[..., 1, :], rows[..., 2, :], out=y[..., 0, :])
    y[:, :, :, 1:, 0] += rows[:, :, :, :-1, 0]
    torch.add(rows[..., 0, :], rows[..., 1, :], out=y[..., 1, :])
    y[:, :, :, :-1, 1] += rows[:, :, :, 1:, 2]
    return y.reshape(b, frames // b, 2 * h, 2 * w, num_outputs).permute(0, 4, 1, 2, 3)


def _taps(weight: Float[Tensor, "O C 3 3"]) -> Float[Tensor, "K C"]:
    return weight.permute(2, 3, 0, 1).flatten(0, 2)


def _bias_of_taps(bias: Float[Tensor, " O"]) -> Float[Tensor, " K"]:
    """The bias at the middle tap, which every pixel reads, whatever its place."""
    return F.pad(bias, (4 * len(bias), 4 * len(bias)))


def _precise(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return x if x.dtype == torch.float64 else x.float()
