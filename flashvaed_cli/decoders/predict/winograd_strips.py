"""How much of a layer `winograd3d` works on at once: strips of rows of tiles, or parts of the kernel.

Either the kernel is transformed once and the frame taken in strips that stay in the cache, or, if the transformed
kernel is larger than the cache and than the frame, the whole frame is transformed once and the kernel taken in parts.
Imports no torch, so that memory predictions can use it too.
"""

from __future__ import annotations

MIN_TILES = 64
"""Tiles per call below which transforming the kernel costs more than it saves."""

STRIP_ELEMENTS = 1 << 20
"""Elements of the transformed input that are worked on at once: they should stay in the cache."""

STRIP_POSITIONS = 192
"""Rows below which the matrix products would be slow, cache or not."""

WHOLE_KERNEL_ELEMENTS = 1 << 24
"""Elements of the largest transformed kernel that is kept whole: more would take fresh memory on every call."""

OUTPUTS_AT_ONCE = 64
"""Output channels in a part of the kernel."""


def rows_per_strip(num_rows: int, row_positions: int, in_width: int, kernel_elements: int) -> int:
    """Tile rows that are worked on at once, of `num_rows`.

    Args:
        row_positions: tiles in a row over all frames and clips.
        kernel_elements: of the transformed kernel.
    """
    row_elements = 36 * in_width * row_positions
    if kernel_elements > WHOLE_KERNEL_ELEMENTS and num_rows * row_elements <= kernel_elements:
        return num_rows
    return min(num_rows, max(STRIP_ELEMENTS // row_elements, -(-STRIP_POSITIONS // row_positions)))


def outputs_at_once(out_width: int, kernel_elements: int, *, one_strip: bool) -> int:
    """Output channels whose part of the kernel is transformed at once."""
    in_parts = one_strip and kernel_elements > WHOLE_KERNEL_ELEMENTS
    return min(out_width, OUTPUTS_AT_ONCE) if in_parts else out_width


def working_elements(num_rows: int, row_positions: int, in_width: int, out_width: int, kernel_elements: int) -> int:
    """Elements that live at once beside a layer's input and output: kernel, patches or products, tiles."""
    strip = rows_per_strip(num_rows, row_positions, in_width, kernel_elements)
    at_once = outputs_at_once(out_width, kernel_elements, one_strip=strip == num_rows)
    positions = strip * row_positions
    part = kernel_elements * at_once // out_width
    return part + 36 * positions * (in_width + max(in_width, at_once)) + 16 * positions * out_width
