"""3x3 kernels by Winograd's minimal filtering F(4x4, 3x3): 36 products for 16 outputs instead of 144.

A 6x6 tile of the input (tiles overlap by two) is transformed by small integers, multiplied with the
transformed kernel, and transformed back to 4x4 outputs; a causal kernel's temporal taps are added up between
the transforms, so that these are paid once for three taps.

Float32 loses about one digit (1e-5 of the largest output). Half precision would lose all its digits in the
transforms, so half-precision input takes the sum over taps instead.

Reference: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, arXiv 1509.09308, section 4.3.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from flashvaed_cli.decoders.convolution import Future, Past, remember, time_window
from flashvaed_cli.decoders.exact_operators import HALF_PRECISION, TapwiseConv3d

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

STRIP_ELEMENTS = 1 << 20
"""Elements of the transformed input that are in work at once: they should stay in the cache."""

STRIP_POSITIONS = 192
"""Rows of the matrix products below which these would be slow, cache or not."""

MIN_TILES = 128
"""Tiles of one call below which transforming the kernel costs more than it spares (one frame of 32x32: 64)."""


def winograd_conv(
    frames: list[Float[Tensor, "B C _ H W"]],
    weight: Float[Tensor, "O C kt 3 3"],
    bias: Float[Tensor, " O"],
    *,
    num_outputs: int,
) -> Float[Tensor, "B O T H W"]:
    """Valid in time, zero-padded in space: the last `num_outputs` frames' outputs; frames before the list are zero.

    Args:
        frames: clips that follow each other in time; past frames and the chunk's own need not be one tensor.
    """
    b, _, _, height, width = frames[-1].shape
    num_inputs = sum(clip.shape[2] for clip in frames)
    rows, columns = -(-height // 4), -(-width // 4)
    transform, inverse = _plane(_INPUT, weight), _plane(_OUTPUT, weight)
    kernel = _fold(weight)
    strip = rows if torch.compiler.is_compiling() else _rows_per_strip(num_inputs * b * columns, weight.shape[1])
    out = None if strip == rows or torch.is_grad_enabled() else _empty(frames[-1], num_outputs, bias)
    strips = []
    for top in range(0, rows, strip):
        count = min(strip, rows - top)
        patches = _patches(frames, 4 * top - 1, count, columns)  # [36, T' B n C]
        tiles = (transform @ patches).view(36, num_inputs, -1, weight.shape[1])
        products = _multiply(tiles, kernel, num_outputs)  # [36, T B n, O]
        pixels = (inverse @ products.flatten(1)).view(4, 4, num_outputs, b, count, columns, -1)
        pixels = pixels.permute(3, 2, 4, 0, 5, 1, 6).reshape(b, num_outputs, 4 * count, 4 * columns, -1)
        pixels = pixels[:, :, : height - 4 * top, :width]
        if out is None:
            strips.append(pixels + bias)
        else:
            torch.add(pixels, bias, out=out[:, :, 4 * top : 4 * (top + count)])
    y = torch.cat(strips, dim=2) if out is None else out
    return y.permute(0, 4, 1, 2, 3)


def _empty(clip: Float[Tensor, "B C t H W"], num_frames: int, bias: Float[Tensor, " O"]) -> Float[Tensor, "B T H W O"]:
    b, _, _, height, width = clip.shape
    return clip.new_empty(b, num_frames, height, width, bias.shape[0])


def _rows_per_strip(positions_per_row: int, in_width: int) -> int:
    """Tile rows that are worked on at once."""
    fitting = STRIP_ELEMENTS // (36 * in_width * positions_per_row)
    return max(fitting, -(-STRIP_POSITIONS // positions_per_row))


def _plane(matrix: Matrix, like: Tensor) -> Float[Tensor, "P Q"]:
    """A transform of both axes of a tile, as one matrix."""
    one = torch.tensor(matrix, dtype=like.dtype, device=like.device)
    return torch.kron(one, one)


def _fold(weight: Float[Tensor, "O C kt 3 3"]) -> Float[Tensor, "36 kt C O"]:
    """The transformed kernel; cheap beside the products, so it is made on every call and may change in place."""
    o, c, kt = weight.shape[:3]
    taps = weight.permute(3, 4, 2, 1, 0).reshape(9, kt * c * o)
    return (_plane(_KERNEL, weight).div(24 * 24) @ taps).view(36, kt, c, o)


def _patches(frames: list[Float[Tensor, "B C _ H W"]], top: int, count: int, columns: int) -> Float[Tensor, "36 N"]:
    """The 6x6 patches, four pixels apart, of a strip of tiles whose first patch begins at row `top`.

    Zeros beyond the border. Row-major inside a patch; then frame, clip, row and column of the tile, channel.
    """
    height, width = frames[-1].shape[3:]
    bottom, right = top + 4 * count + 2, 4 * columns + 2
    inside = slice(max(top, 0), min(bottom, height))
    padding = (0, 0, 1, right - 1 - width, inside.start - top, bottom - inside.stop)
    clips = [clip[:, :, :, inside].permute(2, 0, 3, 4, 1) for clip in frames]  # [t, B, rows, W, C]
    padded = torch.cat([F.pad(clip, padding) for clip in clips]) if len(clips) > 1 else F.pad(clips[0], padding)
    patches = padded.unfold(2, 6, 4).unfold(3, 6, 4)  # [T', B, rows, columns, C, 6, 6]
    return patches.permute(5, 6, 0, 1, 2, 3, 4).reshape(36, -1)


def _multiply(
    tiles: Float[Tensor, "36 Ti N C"], kernel: Float[Tensor, "36 kt C O"], num_outputs: int
) -> Float[Tensor, "36 TN O"]:
    """Per position of the tile, the sum over the temporal taps; taps before the first frame are skipped."""
    num_inputs, n = tiles.shape[1:3]
    kt = kernel.shape[1]
    rows = tiles.flatten(1, 2)  # [36, T' N, C]
    first = num_inputs - num_outputs  # the frame that the first output lies on
    products = torch.bmm(rows[:, first * n :], kernel[:, kt - 1])
    for delay in range(1, kt):
        skipped = max(delay - first, 0)  # outputs whose tap reaches before the first frame
        if skipped < num_outputs:
            source = rows[:, (first + skipped - delay) * n : (num_inputs - delay) * n]
            products[:, skipped * n :].baddbmm_(source, kernel[:, kt - 1 - delay])
    return products


class WinogradConv3d(TapwiseConv3d):
    """causal3d with a 3x3 kernel in space, where it pays; else the sum over taps. Weight `[O, C, kt, 3, 3]`."""

    def forward(
        self, x: Float[Tensor, "B C T H W"], past: Past = None, future: Future = None
    ) -> Float[Tensor, "B O T H W"]:
        b, _, t, h, w = x.shape
        if x.dtype in HALF_PRECISION or b * t * -(-h // 4) * -(-w // 4) < MIN_TILES:
            return super().forward(x, past, future)
        if self.spec.time_padding != "zeros":
            window = time_window(x, self.spec, self.address, past, future)
            return winograd_conv([window], self.weight, self.bias, num_outputs=t)
        num_past = self.spec.kernel[0] - 1
        frames = [x] if past is None or num_past == 0 else [past[self.address], x]
        y = winograd_conv(frames, self.weight, self.bias, num_outputs=x.shape[2])
        remember(x, num_past, self.address, past, future)
        return y
