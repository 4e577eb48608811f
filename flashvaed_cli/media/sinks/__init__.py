"""Where decoded frames go, as they come: arrays, pictures, raw bytes. `media.writer` is the one for MP4."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from torch import Tensor


class FrameSink(Protocol):
    """Takes the frames of one video in order. A context manager; leaving it by an exception discards the output."""

    num_frames: int

    def __enter__(self) -> FrameSink: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write(self, chunk: Tensor) -> None:
        """Add frames [3, T, H, W] in [-1, 1]."""
        ...
