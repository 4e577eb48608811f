"""Video files out, with PyAV: H.264 MP4, streaming, written atomically."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import av.codec.codec
import av.container
import av.error
import av.video
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from jaxtyping import Float, UInt8
from torch import Tensor

from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.errors import MediaError
from flashvaed_cli.media.frames.colour import SCALER
from flashvaed_cli.media.frames.container import ffmpeg_reason
from flashvaed_cli.media.pixels import to_pixels
from flashvaed_cli.media.video import MAX_FPS


def write_video(
    path: str | Path, chunks: Iterable[Float[Tensor, "C T H W"]], *, fps: Fraction | float | int, crf: int = 16
) -> int:
    """Encode chunks of frames as they arrive into an H.264 MP4; see `VideoWriter`.

    Returns:
        The number of frames written.
    Raises:
        MediaError: no frame arrived, or the file cannot be written. Whatever `chunks` raises passes
            through; in either case no file is left and an older one at `path` is untouched.
    """
    with VideoWriter(path, fps=fps, crf=crf) as writer:
        for chunk in chunks:
            writer.write(chunk)
    return writer.num_frames


class VideoWriter:
    """Streaming H.264 writer: 8-bit 4:2:0, BT.709, index at the front, plays everywhere.

    4:2:0 needs even sizes, so an odd height or width gets one more row or column inside the file, a
    copy of the last. The file is written under a hidden temporary name beside the target and replaces it
    when complete: a killed process leaves no half-written target (the temporary file may remain).
    Use as a context manager; leaving it by an exception discards the file.
    """

    def __init__(
        self, path: str | Path, *, fps: Fraction | float | int, crf: int = 16, comment: str | None = None
    ) -> None:
        self.path = Path(path)
        self.num_frames = 0
        self._fps = Fraction(fps).limit_denominator(1001)
        if not 0 < self._fps <= MAX_FPS:
            raise MediaError(f"{fps} frames per second cannot be written to {path}: give a rate above 0, up to 1000.")
        self._crf = crf
        self._comment = comment
        self._size: tuple[int, int] | None = None
        self._atomic = contextlib.ExitStack()
        self._container: av.container.OutputContainer | None = None
        self._stream: av.video.VideoStream | None = None

    def __enter__(self) -> VideoWriter:
        with self._mendable():
            sibling = self._atomic.enter_context(atomic_path(self.path))
            try:
                self._container = av.open(f"file:{sibling}", "w", format="mp4", options={"movflags": "+faststart"})
                if self._comment is not None:
                    self._container.metadata["comment"] = self._comment
            except BaseException as failure:
                self._discard(failure)
                raise
        return self

    def write(self, chunk: Float[Tensor, "C T H W"]) -> None:
        """Encode the chunk's frames; values outside [-1, 1] are clipped, NaN is a ValueError."""
        for frame in to_pixels(chunk, self.num_frames):
            height, width = frame.shape[:2]
            self._check_size(height, width)
            even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            self._encode(np.ascontiguousarray(even))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._discard(error)
            return
        try:
            self._finish()
        except BaseException as failure:
            self._discard(failure)
            raise

    def _check_size(self, height: int, width: int) -> None:
        if self._size is None:
            self._size = (height, width)
            self._stream = self._add_stream(height + height % 2, width + width % 2)
        if self._size != (height, width):
            raise ValueError(f"frame {self.num_frames} is {height}x{width}, those before it {self._size}")

    def _add_stream(self, height: int, width: int) -> av.video.VideoStream:
        if self._container is None:
            raise ValueError("a VideoWriter is used as a context manager: `with VideoWriter(...) as writer:`")
        with self._mendable():
            stream = self._container.add_stream("libx264", rate=self._fps, options={"crf": str(self._crf)})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            context = stream.codec_context
            context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
            context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
            return stream

    def _encode(self, frame: UInt8[np.ndarray, "H W 3"]) -> None:
        assert self._container is not None
        assert self._stream is not None
        source = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture = source.reformat(
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            interpolation=SCALER,
        )
        picture.pts, picture.time_base = self.num_frames, 1 / self._fps
        with self._mendable():
            packets = self._stream.encode(picture)
            if self.num_frames == 0:
                _start(self._container)
            self._container.mux(packets)
        self.num_frames += 1

    def _finish(self) -> None:
        if self._container is None or self._stream is None:
            raise MediaError(f"No frame arrived for {self.path}: nothing was written.")
        with self._mendable():
            self._container.mux(self._stream.encode(None))
            self._container.close()
            self._atomic.close()

    def _discard(self, error: BaseException) -> None:
        if self._container is not None:
            with contextlib.suppress(av.error.FFmpegError, OSError):
                self._container.close()
        self._atomic.__exit__(type(error), error, error.__traceback__)

    @contextlib.contextmanager
    def _mendable(self) -> Iterator[None]:
        try:
            yield
        except av.codec.codec.UnknownCodecError as error:
            raise MediaError(
                "This PyAV has no libx264 encoder: install the wheel from PyPI (pip install av)."
            ) from error
        except (av.error.FFmpegError, OSError) as error:
            raise MediaError(
                f"Cannot write {self.path}: {ffmpeg_reason(error)}. "
                "Check the permissions of the folder and the space on its disk."
            ) from error


def _start(container: av.container.OutputContainer) -> None:
    """Open the file; an interrupted call is made again, as Python does for its own files."""
    while True:
        with contextlib.suppress(InterruptedError):
            container.start_encoding()
            return
