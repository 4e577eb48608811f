"""In which bands of rows a light block runs on the CPU, so that what lies between its layers stays in the cache.

Imports no torch, so that memory predictions can use it too.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashvaed_cli.decoders.spec.blocks import ResBlockSpec
from flashvaed_cli.decoders.spec.operators import Operator

BYTES_PER_FRAME, BYTES_PER_CLIP = 4 << 20, 16 << 20
"""Of the widest tensor of a band: of layers that take frames apart, and of those with taps in time. Measured, two cores
with 32 MB of shared cache, float32 and bfloat16: half as much or twice as much is slower by up to a tenth."""
FEWEST_BYTES = 12 << 20
"""Of a tensor that is worth parting."""
FEWEST_ROWS = 16
_LIGHT: tuple[Operator, ...] = ("frame2d", "dwsep3d", "pointwise")
"""Others, dense in time, take longer in bands: their own transforms and matrix products are blocked already."""


@dataclass(frozen=True)
class BandShape:
    """How the clips of a block are parted.

    Attributes:
        halo: rows around a band that its values depend on.
        takes_frames_apart: no layer has taps in time.
        takes_rows_apart: no norm is over whole frames.
        width: channels of its widest tensor.
    """

    halo: int
    takes_frames_apart: bool
    takes_rows_apart: bool
    width: int

    @classmethod
    def of(cls, spec: ResBlockSpec) -> BandShape | None:
        """That of a residual block; None if bands do not suit its layers."""
        layers = spec.layers
        if spec.sees_whole_clip or any(layer.operator not in _LIGHT for layer in layers.values()):
            return None
        shape = cls(
            halo=max(sum(layers[name].kernel[1] // 2 for name in path) for path in spec.paths),
            takes_frames_apart=all(layer.kernel[0] == 1 for layer in layers.values()),
            takes_rows_apart=not spec.sees_whole_frames,
            width=max(spec.in_width, spec.widest_output),
        )
        return shape if shape.takes_frames_apart or shape.takes_rows_apart else None

    def size(self, num_frames: int, height: int, columns: int, item_bytes: int) -> tuple[int, int] | None:
        """Frames and rows of a band; None where the whole clip is small enough.

        Args:
            item_bytes: of an element, times the number of clips.
        """
        frames = 1 if self.takes_frames_apart else num_frames
        limit = BYTES_PER_FRAME if self.takes_frames_apart else BYTES_PER_CLIP
        row_bytes = frames * self.width * columns * item_bytes
        if row_bytes * height * num_frames <= max(FEWEST_BYTES, limit) * frames:
            return None
        rows = min(max(limit // row_bytes, FEWEST_ROWS), height) if self.takes_rows_apart else height
        return None if (frames, rows) == (num_frames, height) else (frames, rows)
