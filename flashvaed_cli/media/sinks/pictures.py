"""Frames as PNG files: a single picture, or a numbered one for every frame."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.errors import MediaError
from flashvaed_cli.media.pixels import to_pixels
from flashvaed_cli.ownership import SOFTWARE

_FAST_COMPRESSION = 3  # of 9: half the time of the default for a few percent of the size


def picture_name(number: int) -> str:
    """A frame's file name, counted from 0; ffmpeg reads the folder as `%06d.png`."""
    return f"{number:06d}.png"


class PictureFolder:
    """A PNG file for every frame, in an existing folder. A context manager."""

    def __init__(self, folder: Path) -> None:
        self.num_frames = 0
        self._folder = folder

    def __enter__(self) -> PictureFolder:
        return self

    def write(self, chunk: Float[Tensor, "C T H W"]) -> None:
        """Add frames."""
        for pixels in to_pixels(chunk, self.num_frames):
            _save(pixels, self._folder / picture_name(self.num_frames))
            self.num_frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class PictureFile:
    """A PNG file of a single frame, written atomically. A context manager."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.num_frames = 0

    def __enter__(self) -> PictureFile:
        return self

    def write(self, chunk: Float[Tensor, "C T H W"]) -> None:
        """Write the frame.

        Raises:
            MediaError: more than one frame.
        """
        if self.num_frames + chunk.shape[1] > 1:
            raise MediaError(
                f"{self.path} is one picture, but there are several frames: give a folder and --format png."
            )
        with atomic_path(self.path) as sibling:
            _save(to_pixels(chunk)[0], sibling)
        self.num_frames = 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def _save(pixels: UInt8[np.ndarray, "H W 3"], path: Path) -> None:
    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    Image.fromarray(pixels).save(path, format="png", pnginfo=mark, compress_level=_FAST_COMPRESSION)
