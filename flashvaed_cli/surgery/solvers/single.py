"""Blocks without a shortcut around their convolutions: resamplers, heads, single layers."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.modules.blocks import ConvBlock, Downsample, Head, Upsample
from flashvaed_cli.decoders.modules.cell_blocks import CellUpsample
from flashvaed_cli.decoders.modules.shuffle_blocks import ShuffleUpsample
from flashvaed_cli.surgery.channel_fit import ChannelFit
from flashvaed_cli.surgery.layer_fit import DenseFit, LayerError, LayerFit
from flashvaed_cli.surgery.recording import RecordedRows
from flashvaed_cli.surgery.rows import finer_positions, gather_rows
from flashvaed_cli.surgery.solvers.pair import Clip, Pair
from flashvaed_cli.surgery.solvers.steps import fit_of, solve_entering_gain, solve_layer, targets, with_gap
from flashvaed_cli.surgery.transfer import (
    doubled,
    first_matrix,
    pick,
    residual_channels,
    residual_kernel,
    wide_channels,
)


def solve_upsample(pair: Pair[Upsample]) -> list[LayerError]:
    """`temporal` on the small frames, if a clip has more than the first; then `spatial` on the enlarged ones."""
    old, new = pair.reference, pair.student
    errors = []
    if new.temporal is not None and any("temporal" in rows.positions for _, rows in pair.clips()):
        assert old.temporal is not None
        both_halves = doubled(pair.before, old.temporal)
        errors.append(
            solve_layer(
                fit_of(pair, "temporal", pair.before, both_halves),
                pair,
                "temporal",
                lambda y: [y if new.grows_first else y[:, :, 1:]],
                lambda _, rows: targets(pair, rows, "temporal", both_halves),
            )
        )

    def enlarged(y: Clip) -> list[Clip]:
        return [new.enlarge(new.double_frames(y))]

    spatial = fit_of(pair, "spatial", pair.before, pair.after)

    def target(_: Clip, rows: RecordedRows) -> Tensor:
        return with_gap(targets(pair, rows, "spatial", pair.after), pair, rows)

    errors.append(solve_layer(spatial, pair, "spatial", enlarged, target))
    return errors


def solve_shuffle(pair: Pair[ShuffleUpsample] | Pair[CellUpsample]) -> list[LayerError]:
    """The layer, for the original's output, and for the original's residual where that became part of the layer."""
    old, new = pair.reference, pair.student
    wide = wide_channels(pair.after, old.spec.cell)
    if pair.settings.mode == "channel":
        kernel = old.conv.dense_kernel()
        if old.spec.residual and not new.spec.residual:
            kernel = kernel + residual_kernel(old.spec).to(kernel)
        fit: LayerFit = ChannelFit(
            new.conv, kernel, old.conv.bias, before=pair.before, after=wide, settings=pair.settings
        )
        return [solve_layer(fit, pair, "conv", lambda y: [y], lambda _, rows: rows.inputs["conv"])]

    def target(y: Clip, rows: RecordedRows) -> Tensor:
        wanted = rows.outputs["conv"]
        if old.spec.residual:
            wanted = wanted + rows.inputs["conv"][:, residual_channels(old.spec).to(wanted.device)]
        wanted = pick(wanted, wide, 1)
        if new.spec.residual:
            own = gather_rows(y, rows.positions["conv"])
            wanted = wanted - own[:, residual_channels(new.spec).to(wanted.device)]
        return with_gap(wanted, pair, rows)

    return [solve_layer(fit_of(pair, "conv", pair.before, wide), pair, "conv", lambda y: [y], target)]


def solve_cells(pair: Pair[CellUpsample]) -> list[LayerError]:
    """The same, then the layer of first frames, on those of the positions that are in one."""
    errors, new = solve_shuffle(pair), pair.student
    if new.first is None:
        return errors
    old, wide = pair.reference, wide_channels(pair.after, pair.reference.spec.first_cell)
    is_full = pair.settings.mode == "full"
    fit: LayerFit = DenseFit([new.first], settings=pair.settings)
    if not is_full:
        weight, bias = first_matrix(old)
        kernel = weight[:, :, None, None, None]
        fit = ChannelFit(new.first, kernel, bias, before=pair.before, after=wide, settings=pair.settings)
    for y, rows in pair.clips():
        t, h, w = y.shape[2:]
        positions = rows.positions["conv"]
        in_first = positions // (h * w) % t == 0
        at = positions[in_first]
        at = at // (t * h * w) * (h * w) + at % (h * w)  # of [B, 1, H, W]
        given = rows.inputs["conv"][in_first]
        if is_full:
            wanted = old.first_frame(_as_clip(given), _as_clip(rows.outputs["conv"][in_first]))
            target = pick(gather_rows(wanted, torch.arange(len(at))), wide, 1)
            target = target - gather_rows(new.conv(y[:, :, :1])[:, :: new.spec.factor[0]], at)
        fit.update([y[:, :, :1]], target if is_full else given, at)
    return [*errors, fit.solve_()]


def _as_clip(rows: Float[Tensor, "N C"]) -> Float[Tensor, "1 C 1 N 1"]:
    """Rows as the positions of one frame."""
    return rows.T[None, :, None, :, None]


def solve_downsample(pair: Pair[Downsample]) -> list[LayerError]:
    """`spatial`, then `temporal`: a strided kernel is an unstrided one at every second position of the finer grid."""
    new = pair.student
    if pair.settings.mode == "channel":
        return []
    spatial = fit_of(pair, "spatial", pair.before, pair.after)
    for y, rows in pair.clips():
        centres = finer_positions(rows.positions["spatial"], y.shape, step=(1, 2, 2), first=(0, 1, 1))
        spatial.update([y], pick(rows.outputs["spatial"], pair.after, 1), centres)
    errors = [spatial.solve_()]
    if new.temporal is None or not any("temporal" in rows.positions for _, rows in pair.clips()):
        return errors
    temporal = fit_of(pair, "temporal", pair.after, pair.after)
    for y, rows in pair.clips():
        if "temporal" in rows.positions:
            halved = new.halve_size(y)
            last = finer_positions(rows.positions["temporal"], halved.shape, step=(2, 1, 1), first=(2, 0, 0))
            temporal.update([halved], pick(rows.outputs["temporal"], pair.after, 1), last)
    return [*errors, temporal.solve_()]


def solve_head(pair: Pair[Head]) -> list[LayerError]:
    """The norm, if there is one, then the layer that gives the frames."""
    old, new = pair.reference, pair.student
    if old.norm is not None and new.norm is not None:
        solve_entering_gain("norm", old.norm, new.norm, pair)
    fit = fit_of(pair, "conv", pair.before, None)
    return [
        solve_layer(
            fit, pair, "conv", lambda y: [new.before_conv(y)], lambda _, rows: targets(pair, rows, "conv", None)
        )
    ]


def solve_conv(pair: Pair[ConvBlock]) -> list[LayerError]:
    """The single layer of the block."""
    new = pair.student
    fit = fit_of(pair, "conv", pair.before, pair.after)

    def target(_: Clip, rows: RecordedRows) -> Tensor:
        return with_gap(targets(pair, rows, "conv", pair.after), pair, rows)

    return [solve_layer(fit, pair, "conv", lambda y: [new.before_conv(y)], target)]
