"""Run a block on one band of rows after another, so that what lies between its layers stays in the processor's cache.

On frames of 480 x 832 the light layers of a narrowed decoder wait for memory: each of the norms, activations and
convolutions of a residual block reads and writes 100 MB. A band with the rows around it that the kernels read gives the
same values for its rows. Layers without taps in time take a frame at a time, with smaller bands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.modules.convolution import Future, Past
from flashvaed_cli.decoders.predict.bands import BandShape

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


def band_size(shape: BandShape | None, x: Clip) -> tuple[int, int] | None:
    """Frames and rows of a band of a clip; None where it runs as a whole."""
    if shape is None or torch.compiler.is_compiling():  # first: what compiles cannot read the context
        return None
    if not _active.get() or x.device.type != "cpu" or torch.is_grad_enabled():
        return None
    batch, _, num_frames, height, columns = x.shape
    return shape.size(num_frames, height, columns, batch * x.element_size())


def run_in_bands(run: Run, halo: int, size: tuple[int, int], x: Clip, past: Past, future: Future) -> Tensor:
    """What `run` gives for a whole clip, with the state that it leaves.

    Args:
        halo: rows around a band that its values depend on.
        size: frames and rows of a band.
        past: of the layers that run in it.
    """
    (frames, rows), (num_frames, height) = size, x.shape[2:4]
    whole: Tensor | None = None
    states: dict[str, Tensor] = {}
    for first in range(0, num_frames, frames):
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            reads = slice(max(top - halo, 0), min(bottom + halo, height))
            own = slice(top - reads.start, bottom - reads.start)
            before = None if past is None else {address: state[:, :, :, reads] for address, state in past.items()}
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


def _like(part: Tensor, x: Clip, num_frames: int, height: int) -> Tensor:
    """An empty clip with the channels and columns of a part, laid out like `x`."""
    form = torch.channels_last_3d if x.stride(1) == 1 else torch.contiguous_format
    size = (part.shape[0], part.shape[1], num_frames, height, part.shape[4])
    return torch.empty(size, dtype=part.dtype, device=part.device, memory_format=form)
