"""Blocks without a shortcut around their convolutions: resamplers, heads, single layers."""

from __future__ import annotations

from torch import Tensor

from flashvaed_cli.decoders.modules.blocks import ConvBlock, Downsample, Head, Upsample
from flashvaed_cli.decoders.modules.shuffle_blocks import ShuffleUpsample
from flashvaed_cli.surgery.channel_fit import ChannelFit
from flashvaed_cli.surgery.layer_fit import LayerError, LayerFit
from flashvaed_cli.surgery.recording import RecordedRows
from flashvaed_cli.surgery.rows import finer_positions, gather_rows
from flashvaed_cli.surgery.solvers.pair import Clip, Pair
from flashvaed_cli.surgery.solvers.steps import fit_of, solve_entering_gain, solve_layer, targets, with_gap
from flashvaed_cli.surgery.transfer import doubled, pick, residual_channels, residual_kernel, wide_channels


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


def solve_shuffle(pair: Pair[ShuffleUpsample]) -> list[LayerError]:
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
