"""Frames as raw bytes for a pipe: RGB, 8 bits, row by row, nothing between them."""

from __future__ import annotations

import io
import select
from types import TracebackType

from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.media.pixels import to_pixels


class RawWriter:
    """Writes rgb24 frames to a stream, which stays open. A reader that leaves raises BrokenPipeError."""

    def __init__(self, stream: io.RawIOBase | io.BufferedIOBase) -> None:
        self.num_frames = 0
        self._stream = getattr(
            stream, "raw", stream
        )  # unbuffered, so that nothing remains to flush when the reader has left

    def __enter__(self) -> RawWriter:
        return self

    def write(self, chunk: Float[Tensor, "C T H W"]) -> None:
        """Add frames."""
        for frame in to_pixels(chunk, self.num_frames):
            data = memoryview(frame).cast("B")
            while data:
                written = self._stream.write(data)
                if written is None:  # a pipe that does not block, and is full
                    select.select([], [self._stream], [])
                data = data[written or 0 :]
            self.num_frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass
