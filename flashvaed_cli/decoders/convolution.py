"""What all operators share: the clip as a batch of frames, the state between chunks, one layer's parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flashvaed_cli.decoders.spec import ConvSpec

Past = Mapping[str, Tensor] | None
Future = MutableMapping[str, Tensor] | None


def frames_as_batch(x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "BT C H W"]:
    """View the frames as a batch of images (no copy when `x` is channels_last_3d)."""
    b, c, t, h, w = x.shape
    if t == 1:  # a reshape would give the side of one a stride by which torch no longer sees the layout
        return x.squeeze(2)
    return x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w)


def batch_as_frames(x: Float[Tensor, "BT C H W"], batch: int) -> Float[Tensor, "B C T H W"]:
    """Undo `frames_as_batch`."""
    bt, c, h, w = x.shape
    if bt == batch:
        return x.unsqueeze(2)
    return x.reshape(batch, bt // batch, c, h, w).permute(0, 2, 1, 3, 4)


def extend_with_past(
    x: Float[Tensor, "B C T H W"], num_past: int, address: str, past: Past, future: Future
) -> Float[Tensor, "B C Tp H W"]:
    """Put the `num_past` frames before `x` in front of it (zeros before the first) and remember its last ones."""
    if num_past == 0:
        return x
    window = F.pad(x, (0, 0, 0, 0, num_past, 0)) if past is None else torch.cat([past[address], x], dim=2)
    if future is not None:
        future[address] = window[:, :, -num_past:].clone()  # a view would keep the whole chunk alive
    return window


def remember(x: Float[Tensor, "B C T H W"], num_past: int, address: str, past: Past, future: Future) -> None:
    """Write what the next chunk must know, as `extend_with_past` does, without the window that spans both."""
    if num_past == 0 or future is None:
        return
    num_frames = x.shape[2]
    if num_frames >= num_past:
        future[address] = x[:, :, num_frames - num_past :].clone()
        return
    b, c, _, h, w = x.shape
    before = x.new_zeros(b, c, num_past, h, w) if past is None else past[address]
    future[address] = torch.cat([before[:, :, num_frames:], x], dim=2)


class Conv(nn.Module):
    """Weight and bias of one layer; `address` is its name in the spec and in the state."""

    def __init__(self, spec: ConvSpec, address: str, weight_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.spec = spec
        self.address = address
        self.weight = nn.Parameter(torch.empty(weight_shape))
        self.bias = nn.Parameter(torch.zeros(spec.out_width))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def extra_repr(self) -> str:
        s = self.spec
        return f"{s.in_width} -> {s.out_width}, kernel={s.kernel}"
