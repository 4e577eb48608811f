"""Packets and frames of a file, with FFmpeg, or Pillow for animated images. Damage is an error, never concealed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import av.container
import av.error
import av.stream
import av.video

from flashvaed_cli.errors import MediaError
from flashvaed_cli.media.frames.animation import animation_frames, is_animation
from flashvaed_cli.untrusted.demuxers import STILL_OPTIONS, VIDEO_OPTIONS
from flashvaed_cli.untrusted.files import kind_if_irregular

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".mpeg", ".gif", ".apng", ".y4m"}
) | frozenset({".mts", ".m2ts", ".wmv", ".flv", ".3gp", ".ogv"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})

_LIBVPX_VP9 = "libvpx-vp9"
_STRICT = {"err_detect": "explode"}
"""By default decoders silently fill damaged areas from their surroundings."""


def is_still(path: str | Path) -> bool:
    """Whether a file is a still image, which reads as a clip of one frame: by its suffix, unless it is animated."""
    path = Path(path)
    return path.suffix.lower() in IMAGE_SUFFIXES and not is_animation(path)


@contextlib.contextmanager
def open_container(path: Path) -> Iterator[tuple[av.container.InputContainer, av.video.VideoStream]]:
    """The container and its first real video stream (cover pictures of audio files do not count).

    Raises:
        MediaError: missing, empty, a playlist, or nothing that FFmpeg decodes.
    """
    require_file(path)
    with contextlib.ExitStack() as stack:
        try:
            if path.suffix.lower() in IMAGE_SUFFIXES:
                file = stack.enter_context(path.open("rb"))
                opened = av.open(file, "r", options=STILL_OPTIONS, metadata_errors="replace")
            else:
                opened = av.open(f"file:{path}", "r", options=VIDEO_OPTIONS, metadata_errors="replace")
            container = stack.enter_context(opened)
        except av.error.ArgumentError as error:  # not among the formats of the options
            raise MediaError(
                f"{path} is a playlist or in a container format that is not supported. Give the video itself, "
                "e.g. as H.264 MP4."
            ) from error
        except (av.error.FFmpegError, OSError) as error:
            raise MediaError(
                f"{path} cannot be opened as a video or image: {ffmpeg_reason(error)}. If it is cut off or another "
                "kind of file, export it again, e.g. as H.264 MP4."
            ) from error
        attached = av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & attached]
        if not streams or streams[0].codec_context is None:
            raise MediaError(f"{path} holds no video stream that can be decoded. Give a file with pictures in it.")
        streams[0].codec_context.options = _STRICT
        # Frame threading would delay VP9's first frame, which `_strict_vp9` looks at.
        streams[0].thread_type = "SLICE" if streams[0].codec_context.name == "vp9" else "AUTO"
        yield container, streams[0]


def packets(path: Path, container: av.container.InputContainer, stream: av.video.VideoStream) -> Iterator[av.Packet]:
    """The packets of the stream.

    Raises:
        MediaError: one is damaged, or the first depends on earlier ones that are missing.
    """
    needs_key = path.suffix.lower() not in IMAGE_SUFFIXES
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise damaged(path, "a packet is incomplete")
            if needs_key and packet.size and not packet.is_keyframe:
                raise damaged(path, "it begins inside a group of pictures, whose first frame is missing")
            needs_key = False
            yield packet
    except av.error.FFmpegError as error:
        raise damaged(path, ffmpeg_reason(error)) from error


def decoded_frames(path: Path) -> Iterator[av.VideoFrame]:
    """The frames of a video, a still or an animated image, in display order.

    Raises:
        MediaError: as `open_container`; or damaged, at the first frame that is.
    """
    if is_animation(path):
        yield from animation_frames(path)
        return
    with open_container(path) as (container, stream):
        yield from decode(path, container, stream)


def decode(path: Path, container: av.container.InputContainer, stream: av.video.VideoStream) -> Iterator[av.VideoFrame]:
    """The frames of an open container.

    Raises:
        MediaError: damaged, at the first frame that is.
    """
    context = stream.codec_context
    for packet in packets(path, container, stream):
        try:
            frames = context.decode(packet)
            if context.name == "vp9" and (strict := _strict_vp9(stream, frames)):
                context = strict
                frames = context.decode(packet)
        except av.error.FFmpegError as error:
            raise damaged(path, ffmpeg_reason(error)) from error
        for frame in frames:
            if isinstance(frame, av.VideoFrame):
                if frame.is_corrupt:
                    raise damaged(path, "a frame is incomplete")
                yield frame


def _strict_vp9(stream: av.video.VideoStream, first: Sequence[object]) -> av.VideoCodecContext | None:
    """libvpx's decoder, which notices damage where FFmpeg's own conceals it.

    It does not know the container's rotation, so it is not used for rotated videos. `first`: what FFmpeg's
    decoder got from the first packet.
    """
    turned = not first or not isinstance(first[0], av.VideoFrame) or first[0].rotation != 0
    if turned or _LIBVPX_VP9 not in av.codecs_available:
        return None
    context = av.CodecContext.create(_LIBVPX_VP9, "r")
    assert isinstance(context, av.VideoCodecContext)
    for name in ("color_range", "color_primaries", "color_trc", "colorspace"):
        setattr(context, name, getattr(stream.codec_context, name))
    return context


def require_file(path: Path) -> None:
    """Raise MediaError unless the path is a file with something in it."""
    if not path.is_file():
        irregular = kind_if_irregular(path)
        state = f"is {irregular}" if irregular else "is a folder" if path.is_dir() else "does not exist"
        raise MediaError(f"{path} {state}. Give the path of a video or image file.")
    if path.stat().st_size == 0:
        raise MediaError(f"{path} is empty (0 bytes). Export or download it again.")


def damaged(path: Path, reason: str) -> MediaError:
    """The error for a file that cannot be trusted beyond some point."""
    return MediaError(f"{path} is damaged or cut off ({reason}). Download or export it again, or leave it out.")


def ffmpeg_reason(error: Exception) -> str:
    """FFmpeg's or the system's wording of an error, without number and path."""
    return str(getattr(error, "strerror", None) or error)
