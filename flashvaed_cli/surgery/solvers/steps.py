"""What the solvers of all kinds of blocks share: the fit of one convolution, of one norm, and its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from flashvaed_cli.decoders.modules.norms import FrameGroupNorm, Norm
from flashvaed_cli.decoders.modules.operators import Conv
from flashvaed_cli.surgery.channel_fit import ChannelFit
from flashvaed_cli.surgery.layer_fit import GainFit, LayerError, LayerFit, fit_of_layer, rows_for
from flashvaed_cli.surgery.recording import BLOCK, BYPASS_GAP, RecordedRows
from flashvaed_cli.surgery.rows import gather_rows
from flashvaed_cli.surgery.solvers.pair import Clip, Pair
from flashvaed_cli.surgery.transfer import Channels, pick


def rows_of_convolutions(pair: Pair[nn.Module], *joint: Sequence[Conv]) -> dict[str, int]:
    """Positions of a clip by layer: as many for all as the neediest fit wants; a temporal layer has its own grid.

    Args:
        joint: layers that are solved as one.
    """
    layers = {name: layer for name, layer in pair.student.named_children() if isinstance(layer, Conv)}
    alone = [[layer] for name, layer in layers.items() if name not in ("temporal", "shortcut")]
    counts = same_rows(pair, layers, max(rows_for(group, pair.num_clips) for group in [*alone, *joint]))
    if "temporal" in layers:
        counts["temporal"] = rows_for([layers["temporal"]], pair.num_clips)
    return counts


def same_rows(pair: Pair[nn.Module], layers: Iterable[str], num_rows: int) -> dict[str, int]:
    """So many positions of a clip for each of some layers, for the GroupNorms of the block, and for the block."""
    norms = [name for name, norm in pair.reference.named_children() if isinstance(norm, FrameGroupNorm)]
    return dict.fromkeys([*layers, *norms, BLOCK], num_rows)


def fit_of(pair: Pair[nn.Module], name: str, before: Channels, after: Channels) -> LayerFit:
    """The fit of one convolution of the block, by the settings' mode and the layer's operator."""
    layer, source = getattr(pair.student, name), getattr(pair.reference, name)
    if pair.settings.mode == "channel":
        kernel = source.dense_kernel()
        return ChannelFit(layer, kernel, source.bias, before=before, after=after, settings=pair.settings)
    return fit_of_layer(layer, source, before, after, pair.settings)


def targets(pair: Pair[nn.Module], rows: RecordedRows, name: str, after: Channels) -> Tensor:
    """What the fit of a layer aims at: the original's outputs, or in channel mode its inputs."""
    return rows.inputs[name] if pair.settings.mode == "channel" else pick(rows.outputs[name], after, 1)


def with_gap(wanted: Tensor, pair: Pair[nn.Module], rows: RecordedRows) -> Tensor:
    """A target, plus what the bypass that is added to the layer's output misses."""
    owes = pair.settings.mode == "full" and BYPASS_GAP in rows.outputs
    return wanted + rows.outputs[BYPASS_GAP] if owes else wanted


def solve_layer(
    fit: LayerFit,
    pair: Pair[nn.Module],
    name: str,
    read: Callable[[Clip], list[Clip]],
    target: Callable[[Clip, RecordedRows], Tensor],
) -> LayerError:
    """Fit a layer: `read` is what it reads in the new decoder, `target` what it should give at the rows of `name`."""
    for y, recorded in pair.clips():
        if name in recorded.positions:
            fit.update(read(y), target(y, recorded), recorded.positions[name])
    return fit.solve_()


def solve_gain(
    norm: Norm, pair: Pair[nn.Module], read: Callable[[Clip], Clip], target: Callable[[RecordedRows], Tensor]
) -> None:
    """Fit a norm: `read` is what it reads in the new decoder, `target` the original norm's rows on the kept."""
    if norm.gamma is None:
        return  # nothing to fit: the block has all its channels
    fit = GainFit(norm)
    for y, recorded in pair.clips():
        fit.update_normalised(normed_rows(fit.unit, read(y), recorded.positions[BLOCK]), target(recorded))
    fit.solve_()


def solve_entering_gain(name: str, old: Norm, new: Norm, pair: Pair[nn.Module]) -> None:
    """Fit the norm that reads a block's input."""
    solve_gain(
        new,
        pair,
        lambda y: y,
        lambda rows: pick(original_normed(old, name, rows, rows.inputs[BLOCK]), pair.before, 1),
    )


def normed_rows(norm: Norm, x: Clip, positions: Tensor) -> Float[Tensor, "N C"]:
    """A norm's output at some positions: of them alone, or of a GroupNorm from whole frames."""
    if norm.spec.groups is not None:
        return gather_rows(norm(x), positions)
    return norm(gather_rows(x, positions))


def original_normed(norm: Norm, name: str, rows: RecordedRows, given: Tensor) -> Float[Tensor, "N C"]:
    """What a norm of the original made of the rows `given`; of a GroupNorm it was recorded."""
    return rows.outputs[name] if norm.spec.groups is not None else norm(given)
