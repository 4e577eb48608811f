"""Run a block on one band of rows after another, so that what lies between its layers stays in the processor's cache.

On frames of 480 x 832 the light layers of a narrowed decoder wait for memory: each of the norms, activations and
convolutions of a residual block reads and writes 100 MB. A band with the rows around it that the kernels read gives the
same values for its rows. Layers without taps in time take a frame at a time, with smaller bands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.modules.convolution import Future, Past
from flashvaed_cli.decoders.spec.blocks import ResBlockSpec
from flashvaed_cli.decoders.spec.operators import Operator

BYTES_PER_FRAME, BYTES_PER_CLIP = 4 << 20, 16 << 20
"""Of the widest tensor of a band: of layers that take frames apart, and of those with taps in time. Measured, two cores
with 32 MB of shared cache, float32 and bfloat16: half as much or twice as much is slower by up to a tenth."""
_FEWEST_BYTES = 12 << 20
"""Of a tensor that is worth parting."""
_FEWEST_ROWS = 16
_LIGHT: tuple[Operator, ...] = ("frame2d", "dwsep3d", "pointwise")
"""Others, dense in time, take longer in bands: their own transforms and matrix products are blocked already."""

_active: ContextVar[bool] = ContextVar("bands", default=False)

Clip = Float[Tensor, "B C T H W"]
Run = Callable[[Tensor, Past, Future], Tensor]


@contextmanager
def bands() -> Iterator[None]:
    """Let blocks run in bands. Only where nothing watches their layers, which see bands then."""
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)


@dataclass(frozen=True)
class BandShape:
    """How the clips of a block are parted.

    Attributes:
        halo: rows around a band that its values depend on.
        takes_frames_apart: no layer has taps in time.
        takes_rows_apart: no norm is over whole frames.
        width: channels of its widest tensor.
        addresses: of the layers, which are the keys of their states.
    """

    halo: int
    takes_frames_apart: bool
    takes_rows_apart: bool
    width: int
    addresses: tuple[str, ...]

    @classmethod
    def of(cls, spec: ResBlockSpec, address: str) -> BandShape | None:
        """That of a residual block; None if bands do not suit its layers."""
        layers = spec.layers
        if spec.sees_whole_clip or any(layer.operator not in _LIGHT for layer in layers.values()):
            return None
        shape = cls(
            halo=max(sum(layers[name].kernel[1] // 2 for name in path) for path in spec.paths),
            takes_frames_apart=all(layer.kernel[0] == 1 for layer in layers.values()),
            takes_rows_apart=not spec.sees_whole_frames,
            width=max(spec.in_width, spec.widest_output),
            addresses=tuple(f"{address}.{name}" for name in layers),
        )
        return shape if shape.takes_frames_apart or shape.takes_rows_apart else None

    def size(self, x: Clip) -> tuple[int, int] | None:
        """Frames and rows of a band; None where the whole clip is small enough, or bands are not wanted."""
        if not _active.get() or x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        batch, _, num_frames, height, columns = x.shape
        frames = 1 if self.takes_frames_apart else num_frames
        limit = BYTES_PER_FRAME if self.takes_frames_apart else BYTES_PER_CLIP
        row_bytes = batch * frames * self.width * columns * x.element_size()
        if row_bytes * height * num_frames <= max(_FEWEST_BYTES, limit) * frames:
            return None
        rows = max(limit // row_bytes, _FEWEST_ROWS) if self.takes_rows_apart else height
        return None if (frames, rows) >= (num_frames, height) else (frames, min(rows, height))


def run_in_bands(run: Run, shape: BandShape, size: tuple[int, int], x: Clip, past: Past, future: Future) -> Tensor:
    """What `run` gives for a whole clip, with the state that it leaves.

    Args:
        size: frames and rows of a band.
    """
    (frames, rows), (num_frames, height) = size, x.shape[2:4]
    whole: Tensor | None = None
    states: dict[str, Tensor] = {}
    for first in range(0, num_frames, frames):
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            reads = slice(max(top - shape.halo, 0), min(bottom + shape.halo, height))
            own = slice(top - reads.start, bottom - reads.start)
            before = None if past is None else _rows_of(past, shape.addresses, reads)
            after: dict[str, Tensor] | None = None if future is None else {}
            y = run(x[:, :, first : first + frames, reads], before, after)
            if whole is None:
                whole = _like(y, x, num_frames if frames < num_frames else y.shape[2], height)
            whole[:, :, first : first + y.shape[2], top:bottom] = y[:, :, :, own]
            for address, part in (after or {}).items():
                if address not in states:
                    states[address] = _like(part, x, part.shape[2], height)
                states[address][:, :, :, top:bottom] = part[:, :, :, own]
    assert whole is not None
    if future is not None:
        future.update(states)
    return whole


def _rows_of(past: Mapping[str, Tensor], addresses: tuple[str, ...], rows: slice) -> dict[str, Tensor]:
    return {address: past[address][:, :, :, rows] for address in addresses if address in past}


def _like(part: Tensor, x: Clip, num_frames: int, height: int) -> Tensor:
    """An empty clip with the channels and columns of a part, laid out like `x`."""
    form = torch.channels_last_3d if x.stride(1) == 1 else torch.contiguous_format
    size = (part.shape[0], part.shape[1], num_frames, height, part.shape[4])
    return torch.empty(size, dtype=part.dtype, device=part.device, memory_format=form)
