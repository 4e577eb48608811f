"""Frames as one array file, `.npy` or `.pt`: floats in [-1, 1], shape [3, F, H, W], written as they come.

The length is known before the first frame, so the file gets its full size at once and every chunk is written into its
place: memory holds one chunk, whatever the length.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zipfile
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.errors import MediaError

_ZIP_LOCAL_HEADER_BYTES = 30
_ZIP_LENGTHS_OFFSET = 26  # of the name's and the extra field's length in a local header


class ArrayWriter:
    """A `.npy` or `.pt` file of `num_frames` frames, which appears when complete; a context manager.

    `.npy` has no bfloat16: such frames become float32 there.
    """

    def __init__(self, path: str | Path, num_frames: int) -> None:
        self.path = Path(path)
        self.num_frames = 0
        self._length = num_frames
        self._atomic = contextlib.ExitStack()
        self._sibling = self.path
        self._descriptor: int | None = None
        self._data_offset = 0
        self._kept: tuple[int, int, torch.dtype] | None = None

    def __enter__(self) -> ArrayWriter:
        self._sibling = self._atomic.enter_context(atomic_path(self.path))
        return self

    def write(self, chunk: Float[Tensor, "C T H W"]) -> None:
        """Add frames.

        Raises:
            ValueError: more frames than announced, or of another size or dtype than those before.
        """
        if self.path.suffix == ".npy" and chunk.dtype == torch.bfloat16:
            chunk = chunk.float()
        size = (chunk.shape[2], chunk.shape[3], chunk.dtype)
        if self._kept is None:
            self._begin(size)
        if size != self._kept or self.num_frames + chunk.shape[1] > self._length:
            raise ValueError(f"frames {list(chunk.shape)} of {chunk.dtype} do not continue a video of {self._kept}")
        assert self._descriptor is not None
        height, width, dtype = size
        frame_bytes = height * width * dtype.itemsize
        planes = chunk.detach().cpu().contiguous().view(torch.uint8).numpy()
        for channel, plane in enumerate(planes):
            offset = self._data_offset + (channel * self._length + self.num_frames) * frame_bytes
            _write_all(self._descriptor, memoryview(plane).cast("B"), offset)
        self.num_frames += chunk.shape[1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        if error is None and self.num_frames != self._length:
            error = MediaError(
                f"{self.num_frames} of {self._length} frames arrived for {self.path}: nothing was written."
            )
            self._atomic.__exit__(MediaError, error, None)
            raise error
        self._atomic.__exit__(kind, error, trace)

    def _begin(self, size: tuple[int, int, torch.dtype]) -> None:
        height, width, dtype = self._kept = size
        shape = (3, self._length, height, width)
        num_bytes = 3 * self._length * height * width * dtype.itemsize
        if self.path.suffix == ".npy":
            self._data_offset = _begin_npy(self._sibling, shape, dtype, num_bytes)
        else:
            self._data_offset = _begin_pt(self._sibling, shape, dtype)
        self._descriptor = os.open(self._sibling, os.O_WRONLY)


def _begin_npy(path: Path, shape: tuple[int, ...], dtype: torch.dtype, num_bytes: int) -> int:
    """Write an array's header; returns where its data begin."""
    head = io.BytesIO()
    described = np.lib.format.dtype_to_descr(torch.empty(0, dtype=dtype).numpy().dtype)
    np.lib.format.write_array_header_1_0(head, {"descr": described, "fortran_order": False, "shape": shape})
    path.write_bytes(head.getvalue())
    os.truncate(path, len(head.getvalue()) + num_bytes)
    return len(head.getvalue())


def _begin_pt(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Write a file of `torch.save` with room for the data; returns where they begin."""
    with FakeTensorMode():
        described = torch.empty(shape, dtype=dtype)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(described, path)
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entry = next(one for one in archive.infolist() if one.filename.endswith("/data/0"))
        file.seek(entry.header_offset + _ZIP_LENGTHS_OFFSET)
        lengths = struct.unpack("<HH", file.read(4))
    return entry.header_offset + _ZIP_LOCAL_HEADER_BYTES + sum(lengths)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
