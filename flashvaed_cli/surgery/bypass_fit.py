"""The bypass of a stage in the closed-form reconstruction: its layer is solved, then what it still misses is made up.

A stage's output is the sum of its upsampler and its bypass. The layer of a pruned bypass is solved first, for what
the original's copies give; then the upsampler's target is what the original's stage gives less what the new
bypass does. So an unpruned bypass too makes up for what earlier layers have lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.modules.bypass import Bypass
from flashvaed_cli.decoders.spec.blocks import BlockSpec, ShuffleUpsampleSpec
from flashvaed_cli.surgery.activations import ActivationStore
from flashvaed_cli.surgery.channel_fit import ChannelFit
from flashvaed_cli.surgery.layer_fit import DenseFit, FitSettings, LayerError, LayerFit, rows_for
from flashvaed_cli.surgery.recording import BYPASS_GAP, RecordedRows
from flashvaed_cli.surgery.rows import gather_rows, sample_positions
from flashvaed_cli.surgery.transfer import Channels, pick, wide_channels

Clip = Float[Tensor, "_B _C _T _H _W"]


@dataclass(frozen=True)
class BypassPair:
    """A bypass of the original and its successor, with the channels that are left before and behind the stage.

    `ending` is the block whose output the bypass is added to; `entering` are the names in the store of what enters the
    stage, in the original and in the new decoder.
    """

    reference: Bypass
    student: Bypass
    ending: BlockSpec
    before: Channels
    after: Channels
    settings: FitSettings
    store: ActivationStore
    num_clips: int
    entering: tuple[str, str]


def solve_bypass(pair: BypassPair, rows_name: str, generator: torch.Generator) -> list[LayerError]:
    """Solve the layer of the bypass, if it has one; then add to every clip's rows what the bypass misses.

    Args:
        rows_name: under which the rows of the stage's last block are stored.
        generator: draws the positions.
    Raises:
        CalibrationError: too few positions, NaN, or a gram that is not positive definite.
    """
    errors = [] if pair.student.conv is None else [_solve_layer(pair, generator)]
    for clip in range(pair.num_clips):
        rows = RecordedRows.from_tensors(pair.store.load(clip, rows_name))
        at = rows.positions[list(pair.ending.layers)[-1]]
        old, new = (pair.store.load_input(clip, name) for name in pair.entering)
        if isinstance(pair.ending, ShuffleUpsampleSpec):  # whose layer gives the wide channels of the coarser grid
            wide = wide_channels(pair.after, pair.reference.spec.cell_size)
            wanted = pick(gather_rows(pair.reference.wide(old), at), wide, 1)
            rows.outputs[BYPASS_GAP] = wanted - gather_rows(pair.student.wide(new), at)
        else:
            wanted = pick(gather_rows(pair.reference.carried(old, is_first=True), at), pair.after, 1)
            rows.outputs[BYPASS_GAP] = wanted - gather_rows(pair.student.carried(new, is_first=True), at)
        pair.store.save(clip, rows_name, rows.to_tensors())
    return errors


def _solve_layer(pair: BypassPair, generator: torch.Generator) -> LayerError:
    layer = pair.student.conv
    assert layer is not None
    weight, bias = (part.to(layer.weight.device) for part in pair.reference.matrix())
    wide = wide_channels(pair.after, pair.reference.spec.cell_size)
    is_full = pair.settings.mode == "full"
    fit: LayerFit = DenseFit([layer], settings=pair.settings)
    if not is_full:
        kernel = weight[:, :, None, None, None]
        fit = ChannelFit(layer, kernel, bias, before=pair.before, after=wide, settings=pair.settings)
    for clip in range(pair.num_clips):
        old, new = (pair.store.load_input(clip, name) for name in pair.entering)
        b, _, t, h, w = new.shape
        at = sample_positions((b, t, h, w), rows_for([layer], pair.num_clips), generator)
        given = gather_rows(old, at)
        fit.update([new], pick(given @ weight.T + bias, wide, 1) if is_full else given, at)
    return fit.solve_()
