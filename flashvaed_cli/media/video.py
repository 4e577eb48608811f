"""Video files and stills in, with PyAV: probing, frame iteration, clips.

Pixels are RGB. Files are read as a player shows them: turned as rotation metadata (and EXIF in photographs)
say (mirroring is not applied), colours follow the file's matrix and range, and every stored frame counts
once whatever its timestamp (variable frame rates keep their frame count, not their timing).
Non-square pixels are not stretched, and an alpha channel is dropped. Damage is an error where the
container shows it; a Matroska or WebM file that was cut off reads as a shorter video.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.codec.context
import av.container
import av.error
import av.stream
import av.video
import numpy as np
import torch
from av.video.reformatter import Colorspace, Interpolation
from jaxtyping import Float, UInt8
from torch import Tensor

from flashvaed_cli.errors import MediaError

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".mpeg", ".gif", ".y4m"}
) | frozenset({".mts", ".m2ts", ".wmv", ".flv", ".3gp", ".ogv"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})

SCALER = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_HD_MIN_HEIGHT = 577  # untagged files taller than this are BT.709, others BT.601, as players assume
_UNSPECIFIED_COLORSPACE = 2  # AVCOL_SPC_UNSPECIFIED
_FALLBACK_FPS = Fraction(24)
MAX_FPS = 1000


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says about itself.

    Attributes:
        width, height: as displayed, after rotation metadata.
        fps: average frames per second; 24 for stills and where the file does not say.
        num_frames: frames the container announces; None if it does not. 1 for a still.
    """

    path: Path
    width: int
    height: int
    fps: Fraction
    num_frames: int | None


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


def is_still(path: str | Path) -> bool:
    """Whether the suffix is that of a still image, which reads as a clip of one frame."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


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
    with _open_video(path) as (container, stream):
        first = next(_decode(path, container, stream), None)
        if first is None:
            raise MediaError(f"{path} holds no video frame. Is the file cut off? Export or download it again.")
        height, width = _displayed_size(first)
        num_frames = 1 if is_still(path) else (stream.frames or None)
        fps = _FALLBACK_FPS if is_still(path) else _frame_rate(stream)
        return VideoInfo(path=path, width=width, height=height, fps=fps, num_frames=num_frames)


def count_frames(path: str | Path) -> int:
    """The number of frames that decoding will give, by walking the packets (no decoding, except VP8).

    The container's own count is not used: it is absent in Matroska, and in MP4 it includes frames
    that an edit list hides and frames that a truncated file has lost.

    Raises:
        MediaError: as `probe_video`, or a damaged packet anywhere in the file.
    """
    path = Path(path)
    if is_still(path):
        return 1
    with _open_video(path) as (container, stream):
        if stream.codec_context.name == "vp8":  # its alternate reference frames are packets never shown
            return sum(1 for _ in _decode(path, container, stream))
        return sum(1 for packet in _packets(path, container, stream) if packet.size and not packet.is_discard)


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
    with _open_video(path) as (container, stream):
        for index, frame in enumerate(_decode(path, container, stream)):
            if index >= start:
                size = size or scaled_size(frame.height, frame.width, max_side)
                yield _to_rgb(frame, *size)
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
        num_frames: at most so many frames; a file that ends earlier gives what it has. None: to the end.
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
    with _open_video(Path(path)) as (container, stream):
        for index, frame in enumerate(_decode(Path(path), container, stream)):
            wanting = [p for p in open_windows if windows[p].start <= index]
            if not wanting:
                continue
            size = size or scaled_size(frame.height, frame.width, max_side)
            pixels = _to_rgb(frame, *size)
            for place in wanting:
                open_windows[place].append(_cut(pixels, windows[place].crop, Path(path)))
                if len(open_windows[place]) == windows[place].num_frames:
                    yield place, torch.stack(open_windows.pop(place), dim=1)  # [3, T, h, w]
            if not open_windows:
                return


def from_bytes(pixels: UInt8[Tensor, "*B T H W"]) -> Float[Tensor, "*B T H W"]:
    """Stored RGB as float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)


@contextlib.contextmanager
def _open_video(path: Path) -> Iterator[tuple[av.container.InputContainer, av.video.VideoStream]]:
    """The container and its first real video stream (cover pictures of audio files do not count)."""
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "does not exist"
        raise MediaError(f"{path} {state}. Give the path of a video or image file.")
    if path.stat().st_size == 0:
        raise MediaError(f"{path} is empty (0 bytes). Export or download it again.")
    with contextlib.ExitStack() as stack:
        try:
            # A still is opened as an object because FFmpeg takes a `%` in the name of an image for a pattern.
            source = stack.enter_context(path.open("rb")) if is_still(path) else f"file:{path}"
            container = stack.enter_context(av.open(source, "r"))
        except (av.error.FFmpegError, OSError) as error:
            raise MediaError(
                f"{path} cannot be opened as a video or image: {ffmpeg_reason(error)}. If it is cut off or another "
                "kind of file, export it again, e.g. as H.264 MP4."
            ) from error
        attached = av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & attached]
        if not streams or streams[0].codec_context is None:
            raise MediaError(f"{path} holds no video stream that can be decoded. Give a file with pictures in it.")
        streams[0].thread_type = "AUTO"
        yield container, streams[0]


def _packets(path: Path, container: av.container.InputContainer, stream: av.video.VideoStream) -> Iterator[av.Packet]:
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise _damaged(path, "a packet is incomplete")
            yield packet
    except av.error.FFmpegError as error:
        raise _damaged(path, ffmpeg_reason(error)) from error


def _decode(
    path: Path, container: av.container.InputContainer, stream: av.video.VideoStream
) -> Iterator[av.VideoFrame]:
    for packet in _packets(path, container, stream):
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:
            raise _damaged(path, ffmpeg_reason(error)) from error
        for frame in frames:
            if isinstance(frame, av.VideoFrame):
                yield frame


def _damaged(path: Path, reason: str) -> MediaError:
    return MediaError(f"{path} is damaged or cut off ({reason}). Download or export it again, or leave it out.")


def ffmpeg_reason(error: Exception) -> str:
    """FFmpeg's or the system's words for an error, without number and path."""
    return str(getattr(error, "strerror", None) or error)


def _frame_rate(stream: av.video.VideoStream) -> Fraction:
    for rate in (stream.average_rate, stream.guessed_rate):
        if rate and 0 < rate <= MAX_FPS:
            return Fraction(rate)
    return _FALLBACK_FPS


def _quarter_turns(frame: av.VideoFrame) -> int:
    """How often to turn the stored picture by 90 degrees counter-clockwise: 0 to 3.

    Only `rotation` is asked: in PyAV 18 `frame.side_data`, which also knows mirroring, frees memory
    twice on frames that carry a kind of side data newer than itself (EXIF of photographs).
    """
    return round(frame.rotation / 90) % 4


def _displayed_size(frame: av.VideoFrame) -> tuple[int, int]:
    return (frame.width, frame.height) if _quarter_turns(frame) % 2 else (frame.height, frame.width)


def _to_rgb(frame: av.VideoFrame, height: int, width: int) -> UInt8[Tensor, "3 H W"]:
    """Convert, scale to the stored height and width, then turn as the metadata say."""
    colorspace = None  # the frame's own
    if int(frame.colorspace) == _UNSPECIFIED_COLORSPACE:
        colorspace = Colorspace.ITU709 if frame.height >= _HD_MIN_HEIGHT else Colorspace.ITU601
    rgb = frame.reformat(
        width=width, height=height, format="rgb24", src_colorspace=colorspace, interpolation=SCALER
    ).to_ndarray()  # [H, W, 3]
    turned = np.rot90(rgb, _quarter_turns(frame))
    return torch.from_numpy(np.ascontiguousarray(turned.transpose(2, 0, 1)))


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
