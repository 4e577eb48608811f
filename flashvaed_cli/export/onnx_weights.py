"""The weights of several ONNX graphs in one file beside them, each tensor stored once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Self

import onnx_ir as ir

INLINE_BYTES = 1024  # smaller tensors stay in the graph
_ALIGNMENT = 4096  # a page: runtimes map the file instead of reading it


class SharedWeights:
    """A data file that graphs refer to. Equal tensors are stored once, whatever the graphs call them.

    Example:
        with SharedWeights(folder / "decoder.onnx.data") as weights:
            weights.move_from(model)
            ir.save(model, folder / "decoder.onnx")
    """

    def __init__(self, path: Path) -> None:
        """Create the file.

        Args:
            path: in the graphs' folder, under the name by which they refer to it.
        """
        self.path = path
        self._file = path.open("xb")
        self._offsets: dict[tuple[bytes, int], int] = {}

    def __enter__(self) -> Self:
        """Itself; the file is closed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the file."""
        self._file.close()

    def move_from(self, model: ir.Model) -> None:
        """Write a graph's weights here, and leave references to them in the graph."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < INLINE_BYTES:
                continue
            value.const_value = ir.ExternalTensor(
                self.path.name,
                self._offset(tensor.tobytes()),
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=self.path.parent,
            )
        self._file.flush()

    def _offset(self, content: bytes) -> int:
        """Where the content is in the file, written there if it is new."""
        key = (hashlib.sha256(content).digest(), len(content))
        if key not in self._offsets:
            self._file.seek(-(-self._file.tell() // _ALIGNMENT) * _ALIGNMENT)
            self._offsets[key] = self._file.tell()
            self._file.write(content)
        return self._offsets[key]
