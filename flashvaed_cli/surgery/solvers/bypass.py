"""The bypass of a stage: solve its layer, then leave what it still misses to the stage's last block.

A stage's output is the sum of its last block, usually an upsampler, and its bypass. The layer of a pruned bypass is
solved first, against the original's copies. The target of the block is then the original's stage output less that of
the new bypass, so that it also makes up for what earlier layers have lost.
"""

from __future__ import annotations

import torch

from flashvaed_cli.decoders.modules.bypass import Bypass
from flashvaed_cli.decoders.modules.operators import Conv
from flashvaed_cli.decoders.spec.blocks import BlockSpec, ShuffleUpsampleSpec
from flashvaed_cli.surgery.channel_fit import ChannelFit
from flashvaed_cli.surgery.layer_fit import DenseFit, LayerError, LayerFit, rows_for
from flashvaed_cli.surgery.recording import BYPASS_GAP
from flashvaed_cli.surgery.rows import gather_rows, sample_positions
from flashvaed_cli.surgery.solvers.pair import Pair
from flashvaed_cli.surgery.transfer import pick, wide_channels


def solve_bypass(pair: Pair[Bypass], ending: BlockSpec, generator: torch.Generator) -> list[LayerError]:
    """Solve the layer of the bypass, if it has one; then add to every clip's rows what the bypass misses.

    Args:
        ending: the block whose output the bypass is added to; its rows are the stored ones.
        generator: draws the positions.
    Raises:
        CalibrationError: too few positions, NaN, or a gram that is not positive definite.
    """
    errors = [] if pair.student.conv is None else [_solve_layer(pair, pair.student.conv, generator)]
    for clip in range(pair.num_clips):
        rows = pair.rows(clip)
        at = rows.positions[list(ending.layers)[-1]]
        old, new = pair.inputs(clip)
        if isinstance(ending, ShuffleUpsampleSpec):  # whose layer gives the wide channels of the coarser grid
            wide = wide_channels(pair.after, pair.reference.spec.cell_size)
            wanted = pick(gather_rows(pair.reference.wide(old), at), wide, 1)
            rows.outputs[BYPASS_GAP] = wanted - gather_rows(pair.student.wide(new), at)
        else:
            wanted = pick(gather_rows(pair.reference.carried(old, is_first=True), at), pair.after, 1)
            rows.outputs[BYPASS_GAP] = wanted - gather_rows(pair.student.carried(new, is_first=True), at)
        pair.save_rows(clip, rows)
    return errors


def _solve_layer(pair: Pair[Bypass], layer: Conv, generator: torch.Generator) -> LayerError:
    weight, bias = (part.to(layer.weight.device) for part in pair.reference.matrix())
    wide = wide_channels(pair.after, pair.reference.spec.cell_size)
    is_full = pair.settings.mode == "full"
    fit: LayerFit = DenseFit([layer], settings=pair.settings)
    if not is_full:
        kernel = weight[:, :, None, None, None]
        fit = ChannelFit(layer, kernel, bias, before=pair.before, after=wide, settings=pair.settings)
    for clip in range(pair.num_clips):
        old, new = pair.inputs(clip)
        b, _, t, h, w = new.shape
        at = sample_positions((b, t, h, w), rows_for([layer], pair.num_clips), generator)
        given = gather_rows(old, at)
        fit.update([new], pick(given @ weight.T + bias, wide, 1) if is_full else given, at)
    return fit.solve_()
