"""What an export says of itself, the same for every target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Target = Literal["onnx-clip", "onnx-step", "safetensors", "diffusers"]


@dataclass(frozen=True)
class ExportResult:
    """One verified export.

    `max_abs_difference` is that of the frames to the decoder's own, as a fraction of the range of those;
    it was found to be at most `tolerance`. Times are medians of the same latents, in the same run.
    """

    target: Target
    paths: tuple[Path, ...]
    size_bytes: int
    max_abs_difference: float
    tolerance: float
    opset: int | None = None
    onnxruntime_ms: float | None = None
    torch_ms: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The file, or the first of them."""
        return self.paths[0]
