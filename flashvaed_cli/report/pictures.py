"""Clips beside each other, for a video and for a contact sheet. Pixels float in [-1, 1], clips `[C, T, H, W]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.ownership import SOFTWARE

LabelledClip = tuple[str, Tensor]

_BACKGROUND = (24, 24, 27)
_INK = (240, 240, 240)
_FAINT_INK = (161, 161, 170)
_MARK = (255, 196, 0)
_GAP_PX = 6


def side_by_side(frames: Sequence[LabelledClip]) -> Float[Tensor, "3 T Ho Wo"]:
    """Clips from left to right, each with its label in a band above.

    The band lies above the picture, so that no pixel is covered. Sides are even, as 4:2:0 video
    needs. Works on chunks: the layout depends on labels and frame size only.

    Args:
        frames: label and clip `[3, T, H, W]`; all of one shape.
    Raises:
        ValueError: no clips, or shapes that differ.
    """
    num_frames, height, width = _common_shape(frames)
    band_px = _even(max(16, height // 12))
    canvas_height, gap_px = _even(band_px + height), 4
    canvas_width = _even(len(frames) * width + (len(frames) - 1) * gap_px)
    canvas = torch.full((3, num_frames, canvas_height, canvas_width), -1.0)
    for index, (label, clip) in enumerate(frames):
        left = index * (width + gap_px)
        band = Image.new("RGB", (width, band_px), _BACKGROUND)
        _write(ImageDraw.Draw(band), label, (4, 0), width - 8, band_px, _INK)
        pixels = torch.from_numpy(np.asarray(band).copy()).permute(2, 0, 1).float() / 127.5 - 1  # [3, band, W]
        canvas[:, :, :band_px, left : left + width] = pixels.unsqueeze(1)
        canvas[:, :, band_px : band_px + height, left : left + width] = clip.detach().cpu().float().clamp(-1, 1)
    return canvas


def select_frames(num_frames: int, num_columns: int) -> list[int]:
    """Indices of at most `num_columns` frames, spread evenly, first and last among them."""
    if num_frames <= num_columns:
        return list(range(num_frames))
    if num_columns == 1:
        return [num_frames // 2]
    return [round(i * (num_frames - 1) / (num_columns - 1)) for i in range(num_columns)]


def save_strip(
    path: Path,
    rows: Sequence[LabelledClip],
    *,
    frame_numbers: Sequence[int] | None = None,
    num_columns: int = 4,
    difference_gain: float = 4.0,
    max_cell_px: int = 320,
) -> Path:
    """Write a PNG contact sheet: one row per clip, a row of differences, and a column of close-ups.

    The last row is |last clip - the one before it|, amplified. The right-most column shows every
    row without scaling down, cut around the place where those two clips differ most; a frame marks it.

    Args:
        path: PNG to write, whole or not at all.
        rows: from top to bottom, usually video, original decoder, Flash decoder; all of one shape.
        frame_numbers: numbers of the frames given, when the clips hold only frames chosen before
            (so that a long video need not be in memory); all of them are shown then.
        num_columns: how many frames to show when `frame_numbers` is None.
        difference_gain: amplification of the difference.
        max_cell_px: larger frames are scaled down to this side.
    Returns:
        The path.
    Raises:
        ValueError: fewer than two clips, or shapes that differ.
    """
    num_frames, height, width = _common_shape(rows)
    if len(rows) < 2:
        raise ValueError("a contact sheet compares two clips or more")
    if frame_numbers is not None and len(frame_numbers) != num_frames:
        raise ValueError(f"{len(frame_numbers)} frame numbers for {num_frames} frames")
    columns = select_frames(num_frames, num_columns) if frame_numbers is None else list(range(num_frames))
    numbers = columns if frame_numbers is None else list(frame_numbers)
    shown = [(label, clip.detach()[:, columns].cpu().float().clamp(-1, 1)) for label, clip in rows]  # [3, n, H, W]
    difference = (shown[-1][1] - shown[-2][1]).abs()  # [3, n, H, W]
    shown.append((f"difference x{difference_gain:g}", (difference * difference_gain - 1).clamp(max=1)))
    scale = min(1.0, max_cell_px / max(height, width))
    cell = _Cell(max(1, round(width * scale)), max(1, round(height * scale)))
    sheet = _draw_sheet(shown, numbers, cell, _find_close_up(difference.mean(dim=0), cell))
    with atomic_path(path) as sibling:
        mark = PngInfo()
        mark.add_text("Software", SOFTWARE)
        sheet.save(sibling, format="PNG", pnginfo=mark)
    return path


@dataclass(frozen=True)
class _Cell:
    width: int
    height: int


@dataclass(frozen=True)
class _CloseUp:
    """A window of a frame and the whole number by which it is enlarged."""

    column: int
    box: tuple[int, int, int, int]  # left, top, right, bottom
    factor: int


def _find_close_up(difference: Float[Tensor, "n H W"], cell: _Cell) -> _CloseUp:
    """The window with the greatest mean difference; at most half a side, so that enlarging it shows more."""
    _, height, width = difference.shape
    window_width, window_height = (max(1, min(cell.width, width // 2)), max(1, min(cell.height, height // 2)))
    means = torch.nn.functional.avg_pool2d(
        difference.unsqueeze(1), (window_height, window_width), stride=(max(1, height // 64), max(1, width // 64))
    )  # [n, 1, rows, columns]
    column, _, row, left = (int(i) for i in torch.unravel_index(means.argmax(), means.shape))
    top, left = row * max(1, height // 64), left * max(1, width // 64)
    factor = max(1, min(cell.width // window_width, cell.height // window_height))
    return _CloseUp(column, (left, top, left + window_width, top + window_height), factor)


def _draw_sheet(rows: Sequence[LabelledClip], numbers: Sequence[int], cell: _Cell, close_up: _CloseUp) -> Image.Image:
    line_px = 18
    label_px = max(_text_width(label, line_px) for label, _ in rows) + 2 * _GAP_PX
    column_px = max(cell.width, _text_width("frame 0000, 1:1", line_px)) + _GAP_PX
    left_edges = [label_px + i * column_px for i in range(len(numbers) + 1)]
    left_edges[-1] += 2 * _GAP_PX
    row_px = max(cell.height, line_px) + _GAP_PX
    sheet = Image.new("RGB", (left_edges[-1] + column_px, line_px + 2 * _GAP_PX + len(rows) * row_px), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for left, number in zip(left_edges, numbers, strict=False):
        _write(draw, f"frame {number}", (left, _GAP_PX // 2), column_px, line_px, _FAINT_INK)
    title = f"frame {numbers[close_up.column]}, {close_up.factor}:1"
    _write(draw, title, (left_edges[-1], _GAP_PX // 2), column_px, line_px, _MARK)
    for row, (label, clip) in enumerate(rows):
        top = line_px + _GAP_PX + row * row_px
        _write(draw, label, (_GAP_PX, top), label_px, min(row_px, 2 * line_px), _INK, line_px)
        for column, left in enumerate(left_edges[:-1]):
            frame = Image.fromarray(_to_bytes(clip[:, column]).numpy())
            sheet.paste(frame.resize((cell.width, cell.height), Image.Resampling.LANCZOS), (left, top))
            if column == close_up.column:
                sheet.paste(_cut(frame, close_up), (left_edges[-1], top))
                _mark(draw, close_up.box, cell, frame, (left, top))
    return sheet


def _cut(frame: Image.Image, close_up: _CloseUp) -> Image.Image:
    window = frame.crop(close_up.box)
    size = (window.width * close_up.factor, window.height * close_up.factor)
    return window.resize(size, Image.Resampling.NEAREST)


def _mark(
    draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], cell: _Cell, frame: Image.Image, corner: tuple[int, int]
) -> None:
    across, down = cell.width / frame.width, cell.height / frame.height
    left, top, right, bottom = box
    x, y = corner[0] + round(left * across), corner[1] + round(top * down)
    end_x, end_y = corner[0] + round(right * across) - 1, corner[1] + round(bottom * down) - 1
    draw.rectangle((x, y, max(x, end_x), max(y, end_y)), outline=_MARK)  # a banner's window is under a pixel high


def _to_bytes(frame: Float[Tensor, "3 H W"]) -> UInt8[Tensor, "H W 3"]:
    return ((frame + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()


def _common_shape(clips: Sequence[LabelledClip]) -> tuple[int, int, int]:
    """Frames, height and width that all clips share."""
    if not clips:
        raise ValueError("no clips to show")
    shapes = {tuple(clip.shape) for _, clip in clips}
    if len(shapes) > 1:
        raise ValueError("clips differ in shape: " + ", ".join(f"{label} {tuple(c.shape)}" for label, c in clips))
    shape = shapes.pop()
    if len(shape) != 4 or shape[0] != 3 or shape[1] < 1:
        raise ValueError(f"clips are [3, T, H, W] with a frame or more, not {shape}")
    return shape[1], shape[2], shape[3]


def _font(line_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=max(8, round(line_px * 0.68)))


def _text_width(text: str, line_px: int) -> int:
    return int(_font(line_px).getlength(text)) + 1


def _write(
    draw: ImageDraw.ImageDraw,
    text: str,
    corner: tuple[int, int],
    max_width_px: int,
    band_px: int,
    ink: tuple[int, int, int],
    line_px: int | None = None,
) -> None:
    """One line in the middle of a band; made smaller, then cut, where it does not fit."""
    line_px = line_px or band_px
    while line_px > 12 and _text_width(text, line_px) > max_width_px:
        line_px -= 1
    while len(text) > 1 and _text_width(text, line_px) > max_width_px:
        text = text[:-2] + "…"
    draw.text((corner[0], corner[1] + band_px // 2), text, fill=ink, font=_font(line_px), anchor="lm")


def _even(value: int) -> int:
    return value + value % 2
