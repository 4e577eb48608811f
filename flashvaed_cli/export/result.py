"""The record of an export, the same for every target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Target = Literal["safetensors", "diffusers", "onnx-clip", "onnx-step", "comfyui", "pt2", "aoti"]


@dataclass(frozen=True)
class ExportResult:
    """One verified export.

    `max_abs_difference` is the largest difference from the decoder's own frames, as a fraction of their range,
    found to be at most `tolerance` by the program that `checked_with` names. Times are medians on the same
    latents, in the same run.
    """

    target: Target
    paths: tuple[Path, ...]
    size_bytes: int
    max_abs_difference: float
    tolerance: float
    checked_with: str
    opset: int | None = None
    onnxruntime_ms: float | None = None
    torch_ms: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The file, or the first of them."""
        return self.paths[0]

    def to_record(self, folder: Path) -> dict[str, object]:
        """The entry of `export.json`, with stable names: sizes in bytes, differences as fractions of the range."""
        return {
            "target": self.target,
            "files": [path.relative_to(folder).as_posix() for path in self.paths],
            "size_bytes": self.size_bytes,
            "max_difference_of_range": self.max_abs_difference,
            "allowed_difference_of_range": self.tolerance,
            "checked_with": self.checked_with,
        }
