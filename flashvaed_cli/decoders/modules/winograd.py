"""3x3 kernels by Winograd's minimal filtering F(4x4, 3x3): 36 products for 16 outputs instead of 144.

A 6x6 tile of the input (tiles overlap by two) is transformed with small integers, multiplied with the transformed
kernel, and transformed back to 4x4 outputs. A causal kernel's temporal taps are added up between the transforms, so
that three taps need each of these once.

Either frames are processed in strips or kernels in parts: see `winograd_strips`. Mirrored and repeated borders are
written into the patches.

Float32 loses about one digit (1e-5 of the largest output). Half precision would lose all its digits in the transforms,
so half-precision input is summed over taps instead.

Reference: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, arXiv 1509.09308, section 4.3.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from flashvaed_cli.decoders.modules.convolution import Future, Past, remember, require_mirrored, time_clips
from flashvaed_cli.decoders.modules.exact_operators import HALF_PRECISION, TapwiseConv3d
from flashvaed_cli.decoders.predict.winograd_strips import is_worthwhile, outputs_at_once, rows_per_strip
from flashvaed_cli.decoders.spec.layers import SpacePadding

Matrix = tuple[tuple[int, ...], ...]

_INPUT: Matrix = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_KERNEL: Matrix = (  # times 24
    (6, 0, 0),
    (-4, -4, -4),
    (-4, 4, -4),
    (1, 2, 4),
    (1, -2, 4),
    (0, 0, 24),
)
_OUTPUT: Matrix = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)


def winograd_conv(
    frames: list[Float[Tensor, "B C _ H W"]],
    weight: Float[Tensor, "O C kt 3 3"],
    bias: Float[Tensor, " O"],
    *,
    num_outputs: int,
    space_padding: SpacePadding = "zeros",
) -> Float[Tensor, "B O T H W"]:
    """The outputs of the last `num_outputs` frames; frames before the list are zero. Without gradients: torch 2.14
    computes wrong ones for some channels-last kernels with groups.

    Args:
        frames: consecutive clips; past frames and the chunk's own need not be one tensor.
    """
    b, _, _, height, width = frames[-1].shape
    num_inputs = sum(clip.shape[2] for clip in frames)
    rows, columns = -(-height // 4), -(-width // 4)
    weight = weight[:, :, -num_inputs:]  # earlier taps see only zeros
    o, c, kt = weight.shape[:3]
    transform = _plane(_INPUT, weight)
    strip, at_once = rows, o
    if not torch.compiler.is_compiling():  # a graph has no loops
        strip = rows_per_strip(rows, num_inputs * b * columns, c, 4 * weight.numel())
        at_once = outputs_at_once(o, 4 * weight.numel(), one_strip=strip == rows)
    kernels = (_fold(part) for part in weight.split(at_once))
    num_missing = num_outputs + kt - 1 - num_inputs

    def strip_of(top: int, count: int, kernels: Iterable[Tensor]) -> Float[Tensor, "B T h W O"]:
        patches = _patches(frames, 4 * top - 1, count, columns, space_padding)  # [T' B n, 36, C]
        tiles = _each(transform, patches).view(num_inputs, -1, 36 * c)  # [T', B n, 36 C]
        del patches
        pixels = _outputs(tiles, kernels, num_missing, num_outputs).view(num_outputs, b, count, columns, 4, 4, o)
        pixels = pixels.permute(1, 0, 2, 4, 3, 5, 6).reshape(b, num_outputs, 4 * count, 4 * columns, o)
        return pixels[:, :, : height - 4 * top, :width]

    if strip == rows:
        y = strip_of(0, rows, kernels) + bias
    else:
        kept = list(kernels)
        y = frames[-1].new_empty(b, num_outputs, height, width, o)
        for top in range(0, rows, strip):
            count = min(strip, rows - top)
            torch.add(strip_of(top, count, kept), bias, out=y[:, :, 4 * top : 4 * (top + count)])
    return y.permute(0, 4, 1, 2, 3)


def _plane(matrix: Matrix, like: Tensor) -> Float[Tensor, "P Q"]:
    """A transform of both axes of a tile, as one matrix."""
    one = torch.tensor(matrix, dtype=like.dtype, device=like.device)
    return torch.kron(one, one)


def _each(transform: Float[Tensor, "P Q"], tiles: Float[Tensor, "N Q C"]) -> Float[Tensor, "N P C"]:
    """A transform of every tile."""
    return torch.bmm(transform.expand(len(tiles), -1, -1), tiles)


def _fold(weight: Float[Tensor, "O C kt 3 3"]) -> Float[Tensor, "36*O C kt 1"]:
    """The transformed kernel: cheap compared with the products, so made on every call, and the weight may change.

    Its channels are innermost in memory, without which torch would take a slow kernel.
    """
    o, c, kt = weight.shape[:3]
    taps = weight.permute(3, 4, 0, 2, 1).reshape(9, o * kt * c)  # whole runs of channels if they are innermost
    return (_plane(_KERNEL, weight).div(24 * 24) @ taps).view(36 * o, kt, 1, c).permute(0, 3, 1, 2)


def _patches(
    frames: list[Float[Tensor, "B C _ H W"]], top: int, count: int, columns: int, space_padding: SpacePadding
) -> Float[Tensor, "N 36 C"]:
    """The 6x6 patches, four pixels apart, of a strip of tiles whose first patch begins at row `top`.

    By frame, clip, row and column of the tile; row-major inside a patch. Pixels more than one beyond the border are
    zero: no kept output reads them.
    """
    height, width = frames[-1].shape[3:]
    bottom, right = top + 4 * count + 2, 4 * columns + 2
    inside = slice(max(top, 0), min(bottom, height))
    padding = (0, 0, 1, right - 1 - width, inside.start - top, bottom - inside.stop)
    clips = [clip[:, :, :, inside].permute(2, 0, 3, 4, 1) for clip in frames]  # [t, B, rows, W, C]
    padded = torch.cat([F.pad(clip, padding) for clip in clips]) if len(clips) > 1 else F.pad(clips[0], padding)
    if space_padding != "zeros":
        _fill_margins_(padded, height - top, width + 1, at_top=top < 0, inward=2 if space_padding == "reflect" else 1)
    patches = padded.unfold(2, 6, 4).unfold(3, 6, 4)  # [T', B, rows, columns, C, 6, 6]
    return patches.permute(0, 1, 2, 3, 5, 6, 4).reshape(-1, 36, padded.shape[-1])


def _fill_margins_(padded: Float[Tensor, "T B Hp Wp C"], below: int, right: int, *, at_top: bool, inward: int) -> None:
    """Write the frame's own pixels into the margins, in place: rows first, since the columns include their ends.

    Args:
        below, right: row below the frame (perhaps not in this strip) and column to the right of it.
        inward: distance of the copied pixels from the margin: 2 mirrors the frame, 1 repeats its border.
    """
    if at_top:
        padded[:, :, 0] = padded[:, :, inward]
    if below < padded.shape[2]:
        padded[:, :, below] = padded[:, :, below - inward]
    padded[:, :, :, 0] = padded[:, :, :, inward]
    padded[:, :, :, right] = padded[:, :, :, right - inward]


def _outputs(
    tiles: Float[Tensor, "Ti N _K"], kernels: Iterable[Float[Tensor, "_o C kt 1"]], num_missing: int, num_frames: int
) -> Float[Tensor, "TN 16 O"]:
    """The 4x4 outputs of every tile.

    Per position of a tile, the products of its channels with those of the kernel are added up over the temporal taps:
    a convolution over time, of which torch computes all 36 as one with groups. That is why the channels of all
    positions are innermost in memory. The same by matrix products takes twice as long where MKL leaves half of the
    processor's vector width unused, as it does on AMD's.

    Args:
        kernels: consecutive parts of the output channels.
        num_missing: frames before the first, which are zero.
    """
    inverse = _plane(_OUTPUT, tiles)
    images = tiles.permute(2, 0, 1)[None]  # [1, 36 C, T', N]
    parts = []
    for kernel in kernels:
        # Zeros come in front of the frames and behind them; what they give behind is left out. A single tap cannot be
        # dilated, but torch on one thread uses oneDNN for it only then.
        products = F.conv2d(
            images, kernel, padding=(num_missing, 0), dilation=(1 if kernel.shape[2] > 1 else 2, 1), groups=36
        )
        products = products[0].permute(1, 2, 0)[:num_frames]
        parts.append(_each(inverse, products.reshape(-1, 36, kernel.shape[0] // 36)))
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


class WinogradConv3d(TapwiseConv3d):
    """causal3d with a 3x3 kernel in space by Winograd where that is faster, else by taps. Weight `[O, C, kt, 3, 3]`.

    With their gradients, taps are as fast or faster (forward and backward, 2 threads, milliseconds: 96 channels, 9
    frames of 96x96, 386 against 367; 48 channels 109 against 143; 384 channels, 3 of 32x32, 121 against 163).
    """

    def forward(
        self, x: Float[Tensor, "B C T H W"], past: Past = None, future: Future = None
    ) -> Float[Tensor, "B O T H W"]:
        t, spec = x.shape[2], self.spec
        differentiated = x.requires_grad or self.weight.requires_grad or self.bias.requires_grad
        needs_gradients = torch.is_grad_enabled() and differentiated
        if x.dtype in HALF_PRECISION or needs_gradients or not self._is_worthwhile(x, past):
            return super().forward(x, past, future)
        if spec.space_padding == "reflect":
            require_mirrored(x, (1, 1))
        clips = time_clips(x, spec, self.address, past)
        y = winograd_conv(clips, self.weight, self.bias, num_outputs=t, space_padding=spec.space_padding)
        if not spec.num_ahead:
            remember(x, spec.num_past, self.address, past, future, spec.time_padding)
        return y

    def _is_worthwhile(self, x: Float[Tensor, "B C T H W"], past: Past) -> bool:
        b, _, t, h, w = x.shape
        kt = self.spec.kernel[0]
        num_inputs = t if past is None and self.spec.time_padding == "zeros" else t + kt - 1
        return is_worthwhile(
            self.spec.in_width,
            self.spec.out_width,
            kt,
            num_inputs=num_inputs,
            num_outputs=t,
            num_tiles=b * -(-h // 4) * -(-w // 4),
        )
