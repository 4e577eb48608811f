"""Inputs and outputs of the layers of an original's block at sampled positions: the targets of the least squares.

The original runs once per block and clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from flashvaed_cli.decoders.modules.blocks import Downsample
from flashvaed_cli.surgery.rows import gather_rows, sample_positions

BLOCK = "block"
"""The name under which a block's own input and output are recorded."""


BYPASS_GAP = "bypass_gap"
"""The name of the output that the new bypass misses on the kept channels, and that the stage's last layer must add."""


@dataclass(frozen=True)
class RecordedRows:
    """Rows of one clip, by the name of a layer or GroupNorm of the block, and `BLOCK`.

    The `positions` of a layer index its output `[B, T, H, W]`. Its inputs are recorded only where they have the same
    grid, at the same positions.
    """

    inputs: dict[str, Float[Tensor, "_N _C"]]
    outputs: dict[str, Float[Tensor, "_N _O"]]
    positions: dict[str, Int64[Tensor, " _N"]]

    def to_tensors(self) -> dict[str, Tensor]:
        """All rows in one dictionary, to be stored."""
        named = {"inputs": self.inputs, "outputs": self.outputs, "positions": self.positions}
        return {f"{kind}.{name}": rows.clone() for kind, group in named.items() for name, rows in group.items()}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> RecordedRows:
        """Undo `to_tensors`."""
        parts: dict[str, dict[str, Tensor]] = {"inputs": {}, "outputs": {}, "positions": {}}
        for key, tensor in tensors.items():
            kind, name = key.split(".", 1)
            parts[kind][name] = tensor
        return RecordedRows(**parts)


def record_block(
    block: nn.Module, x: Float[Tensor, "_B _C _T _H _W"], num_rows: Mapping[str, int], generator: torch.Generator
) -> tuple[Float[Tensor, "_B _O _F _Ho _Wo"], RecordedRows]:
    """Run a block of the original on a clip; record its convolutions, and the norms that need whole frames.

    Layers of the same grid share their positions.

    Args:
        num_rows: rows to record by layer name, and for `BLOCK`; other layers are not recorded.
        generator: draws the positions.
    Returns:
        The block's output, and the rows.
    """
    rows = RecordedRows({}, {}, {})
    known: dict[tuple[int, ...], Tensor] = {}

    def record(name: str, given: Tensor, output: Tensor) -> None:
        if name not in num_rows or output.shape[2] == 0:
            return
        b, _, t, h, w = output.shape
        if (b, t, h, w) not in known:
            known[b, t, h, w] = sample_positions((b, t, h, w), num_rows[name], generator)
        at = known[b, t, h, w]
        rows.positions[name] = at
        rows.outputs[name] = gather_rows(output, at)
        if given.shape[2:] == output.shape[2:]:
            rows.inputs[name] = gather_rows(given, at)

    handles = [_hook(layer, name, record) for name, layer in block.named_children() if name in num_rows]
    try:
        output = block(x)
        if isinstance(block, Downsample):  # runs its layers strided, without calling them: no hook fires
            record("spatial", x, block.halve_size(x))
            record("temporal", x, output[:, :, 1:])
    finally:
        for handle in handles:
            handle.remove()
    record(BLOCK, x, output)
    return output, rows


def _hook(layer: nn.Module, name: str, record) -> torch.utils.hooks.RemovableHandle:
    return layer.register_forward_hook(lambda _module, inputs, output: record(name, inputs[0], output))
