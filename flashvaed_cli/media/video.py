"""Video files and stills in, with PyAV: probing, frame iteration, clips.

Pixels are RGB. Files are read as a player shows them: turned as rotation metadata (and EXIF in photographs)
say (mirroring is not applied), colours follow the file's matrix and range, and every stored frame counts
once whatever its timestamp (variable frame rates keep their frame count, not their timing).
Non-square pixels are not stretched, and an alpha channel is dropped. HDR is tone-mapped; `frames.colour` says how.
Damage is an error where container or decoder show it; a Matroska or WebM file that was cut off reads as a shorter
video, and VP8, VP9 and JPEG show damage only where their decoding fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av.video
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from flashvaed_cli.errors import MediaError
from flashvaed_cli.media.frames.animation import animation_size, is_animation
from flashvaed_cli.media.frames.colour import displayed_size, to_rgb, tone_mapping
from flashvaed_cli.media.frames.container import decode, decoded_frames, is_still, open_container, packets, require_file

_FALLBACK_FPS = Fraction(24)
MAX_FPS = 1000


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says about itself.

    Attributes:
        width, height: as displayed, after rotation metadata.
        fps: average frames per second; 24 for stills and where the file does not say.
        num_frames: frames the container announces; None if it does not. 1 for a still.
        tone_mapping: how the colours are changed for an SDR screen, in words; None where they are not.
    """

    path: Path
    width: int
    height: int
    fps: Fraction
    num_frames: int | None
    tone_mapping: str | None = None


@dataclass(frozen=True)
class CropBox:
    """A rectangle in pixels of the displayed (and scaled) frame."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Window:
    """Frames [start, start + num_frames) of a file, and the rectangle to cut from them (None: whole frames)."""

    start: int
    num_frames: int
    crop: CropBox | None


def scaled_size(height: int, width: int, max_side: int | None) -> tuple[int, int]:
    """Height and width after shrinking so that the longer side is at most `max_side`; never enlarges."""
    if max_side is None or max(height, width) <= max_side:
        return height, width
    if max_side < 1:
        raise ValueError(f"max_side must be at least 1, not {max_side}")
    scale = max_side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def probe_video(path: str | Path) -> VideoInfo:
    """Open a file, decode its first frame and report its format.

    Raises:
        MediaError: missing, empty, not a video, or its first frame cannot be decoded.
    """
    path = Path(path)
    require_file(path)
    first = next(decoded_frames(path), None)
    if first is None:
        raise MediaError(f"{path} holds no video frame. Is the file cut off? Export or download it again.")
    height, width = displayed_size(first)
    num_frames, fps = _length(path)
    return VideoInfo(path, width, height, fps, num_frames, tone_mapping(first))


def _length(path: Path) -> tuple[int | None, Fraction]:
    """Frames as announced, and frames per second."""
    if is_animation(path):
        return animation_size(path)
    if is_still(path):
        return 1, _FALLBACK_FPS
    with open_container(path) as (_, stream):
        return stream.frames or None, _frame_rate(stream)


def count_frames(path: str | Path) -> int:
    """The number of frames that decoding will give, by walking the packets (no decoding, except VP8).

    The container's own count is not used: it is absent in Matroska, and in MP4 it includes frames
    that an edit list hides and frames that a truncated file has lost.

    Raises:
        MediaError: as `probe_video`, or a damaged packet anywhere in the file.
    """
    path = Path(path)
    if is_animation(path):
        return sum(1 for _ in decoded_frames(path))
    if is_still(path):
        return 1
    with open_container(path) as (container, stream):
        if stream.codec_context.name == "vp8":  # its alternate reference frames are packets never shown
            return sum(1 for _ in decode(path, container, stream))
        return sum(1 for packet in packets(path, container, stream) if packet.size and not packet.is_discard)


def iter_frames(
    path: str | Path, *, start: int = 0, stop: int | None = None, max_side: int | None = None
) -> Iterator[UInt8[Tensor, "3 H W"]]:
    """Decode the frames with index in [start, stop), one at a time, in display order.

    Frames before `start` are decoded and dropped, so that an index is exact in every format.

    Args:
        max_side: shrink (bicubic, antialiased, aspect kept) until the longer side is at most this.
    Raises:
        MediaError: the file is missing, not a video, or damaged within the frames asked for.
    """
    path = Path(path)
    if start < 0 or (stop is not None and stop < start):
        raise ValueError(f"frames [{start}, {stop}) are not a range")
    if stop == start:
        return
    size: tuple[int, int] | None = None
    for index, frame in enumerate(decoded_frames(path)):
        if index >= start:
            size = size or scaled_size(frame.height, frame.width, max_side)
            yield to_rgb(frame, *size)
        if stop is not None and index + 1 >= stop:
            return


def read_clip(
    path: str | Path,
    *,
    start: int = 0,
    num_frames: int | None = None,
    max_side: int | None = None,
    crop: CropBox | None = None,
) -> Float[Tensor, "C T H W"]:
    """Read a clip as float32 RGB in [-1, 1].

    Args:
        num_frames: at most this many; a file that ends earlier gives what it has. None: to the end.
        max_side: shrink until the longer side is at most this many pixels.
        crop: rectangle cut after scaling.
    Raises:
        MediaError: as `iter_frames`; or no frame at `start`, or the crop reaches outside the frame.
    """
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, not {num_frames}")
    stop = None if num_frames is None else start + num_frames
    frames = [_cut(frame, crop, Path(path)) for frame in iter_frames(path, start=start, stop=stop, max_side=max_side)]
    if not frames:
        raise MediaError(
            f"{path} has no frame number {start} (counted from 0): it ends before. Ask for an earlier start."
        )
    return from_bytes(torch.stack(frames, dim=1))  # [C, T, H, W]


def read_windows(
    path: str | Path, windows: Sequence[Window], *, max_side: int | None = None
) -> Iterator[tuple[int, UInt8[Tensor, "3 T h w"]]]:
    """Cut many windows, which may overlap, out of a file in one pass.

    Yields:
        The place in `windows` and the stored RGB bytes, as soon as a window is complete.
    Raises:
        MediaError: as `iter_frames`, or a crop reaches outside the frame; what was yielded before is good. A window
            behind the end of the file is not yielded.
    """
    open_windows: dict[int, list[Tensor]] = {place: [] for place in range(len(windows))}
    size: tuple[int, int] | None = None
    for index, frame in enumerate(decoded_frames(Path(path))):
        wanting = [p for p in open_windows if windows[p].start <= index]
        if not wanting:
            continue
        size = size or scaled_size(frame.height, frame.width, max_side)
        pixels = to_rgb(frame, *size)
        for place in wanting:
            open_windows[place].append(_cut(pixels, windows[place].crop, Path(path)))
            if len(open_windows[place]) == windows[place].num_frames:
                yield place, torch.stack(open_windows.pop(place), dim=1)  # [3, T, h, w]
        if not open_windows:
            return


def from_bytes(pixels: UInt8[Tensor, "*B T H W"]) -> Float[Tensor, "*B T H W"]:
    """Stored RGB as float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)


def _frame_rate(stream: av.video.VideoStream) -> Fraction:
    for rate in (stream.average_rate, stream.guessed_rate):
        if rate and 0 < rate <= MAX_FPS:
            return Fraction(rate)
    return _FALLBACK_FPS


def _cut(frame: UInt8[Tensor, "3 H W"], crop: CropBox | None, path: Path) -> UInt8[Tensor, "3 h w"]:
    if crop is None:
        return frame
    height, width = frame.shape[1:]
    bottom, right = crop.top + crop.height, crop.left + crop.width
    if min(crop.top, crop.left) < 0 or min(crop.height, crop.width) < 1 or bottom > height or right > width:
        raise MediaError(
            f"{path}: the crop {crop} does not fit a frame of {height}x{width} pixels. Choose a smaller one."
        )
    return frame[:, crop.top : bottom, crop.left : right]
