"""When `winograd3d` pays, and how much of a layer it works on at once: strips of rows of tiles, or parts of the kernel.

Either the kernel is transformed once and the frame taken in strips that stay in the cache, or, if the transformed
kernel is larger than the cache and than the frame, the whole frame is transformed once and the kernel taken in parts.
Imports no torch, so that memory predictions can use it too.
"""

from __future__ import annotations

TRANSFORM_COST, FOLD_COST = 8, 19
"""What a multiplication of the frames' transforms and of the kernel's costs, one of the products being 1: their
matrices are small, and they move more memory. Fitted to 30 layers of 24 to 1024 channels and 64 to 40,000 tiles (two
cores of an AMD EPYC with AVX-512, torch 2.14)."""

FEWEST_ELEMENTS, MOST_ELEMENTS = 1 << 19, 1 << 22
"""Bounds for the elements of the transformed input that are worked on at once: as many as the kernel has, so that the
work is worth laying that out, but they should stay in the cache."""

WHOLE_KERNEL_ELEMENTS = 1 << 22
"""Elements of the largest transformed kernel that is kept whole: more would take fresh memory on every call."""

OUTPUTS_AT_ONCE = 64
"""Output channels in a part of the kernel."""


def is_worthwhile(
    in_width: int, out_width: int, num_taps: int, *, num_inputs: int, num_outputs: int, num_tiles: int
) -> bool:
    """Whether a layer is faster by Winograd's filtering than by its taps.

    Args:
        num_taps: temporal taps of the kernel.
        num_inputs, num_outputs: frames of a clip, with and without the past ones.
        num_tiles: in a frame, times the number of clips.
    """
    channels, num_taps = in_width * out_width, min(num_taps, num_inputs)
    num_missing = num_outputs + num_taps - 1 - num_inputs  # frames before the clip, which taps skip
    direct = 9 * 16 * channels * (num_taps * num_outputs - num_missing * (num_missing + 1) // 2) * num_tiles
    transforms = 36 * 36 * in_width * num_inputs * num_tiles + 16 * 36 * out_width * num_outputs * num_tiles
    folding = 36 * 9 * channels * num_taps
    products = 36 * channels * num_taps * num_outputs * num_tiles
    return products + TRANSFORM_COST * transforms + FOLD_COST * folding < direct


def rows_per_strip(num_rows: int, row_positions: int, in_width: int, kernel_elements: int) -> int:
    """Tile rows that are worked on at once, of `num_rows`.

    Args:
        row_positions: tiles in a row over all frames and clips.
        kernel_elements: of the transformed kernel.
    """
    row_elements = 36 * in_width * row_positions
    if kernel_elements > WHOLE_KERNEL_ELEMENTS and num_rows * row_elements <= 2 * kernel_elements:
        return num_rows
    elements = min(max(kernel_elements, FEWEST_ELEMENTS), MOST_ELEMENTS)
    return min(num_rows, max(elements // row_elements, 1))


def outputs_at_once(out_width: int, kernel_elements: int, *, one_strip: bool) -> int:
    """Output channels whose part of the kernel is transformed at once."""
    in_parts = one_strip and kernel_elements > WHOLE_KERNEL_ELEMENTS
    return min(out_width, OUTPUTS_AT_ONCE) if in_parts else out_width


def working_elements(num_rows: int, row_positions: int, in_width: int, out_width: int, kernel_elements: int) -> int:
    """Elements that live at once beside a layer's input and output: kernel, patches or products, tiles."""
    strip = rows_per_strip(num_rows, row_positions, in_width, kernel_elements)
    at_once = outputs_at_once(out_width, kernel_elements, one_strip=strip == num_rows)
    positions = strip * row_positions
    part = kernel_elements * at_once // out_width  # and once more, as torch lays it out
    multiplied = 36 * positions * max(in_width, at_once) + 16 * positions * out_width
    joined = 32 * positions * out_width  # the outputs, and once more in their order
    return 2 * part + 36 * positions * in_width + max(multiplied, joined)
