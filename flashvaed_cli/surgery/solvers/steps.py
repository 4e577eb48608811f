"""Steps that the solvers of all kinds of blocks share: fit one convolution or one norm, and choose its rows."""

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
    """Number of positions of a clip by layer: that of the neediest fit; `temporal` has its own grid and number.

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
    """The same number of positions of a clip for some layers, for the GroupNorms of the block, and for the block."""
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
    """The targets of a layer's fit: the original's outputs, or in channel mode its inputs."""
    return rows.inputs[name] if pair.settings.mode == "channel" else pick(rows.outputs[name], after, 1)


def with_gap(wanted: Tensor, pair: Pair[nn.Module], rows: RecordedRows) -> Tensor:
    """A target, plus what is missing from the bypass that is added to the layer's output."""
    has_gap = pair.settings.mode == "full" and BYPASS_GAP in rows.outputs
    return wanted + rows.outputs[BYPASS_GAP] if has_gap else wanted


def solve_layer(
    fit: LayerFit,
    pair: Pair[nn.Module],
    name: str,
    read: Callable[[Clip], list[Clip]],
    target: Callable[[Clip, RecordedRows], Tensor],
) -> LayerError:
    """Fit a layer; `read` returns its inputs in the new decoder, `target` its wanted outputs at the rows of `name`."""
    for y, recorded in pair.clips():
        if name in recorded.positions:
            fit.update(read(y), target(y, recorded), recorded.positions[name])
    return fit.solve_()


def solve_gain(
    norm: Norm, pair: Pair[nn.Module], read: Callable[[Clip], Clip], target: Callable[[RecordedRows], Tensor]
) -> None:
    """Fit a norm; `read` returns its input in the new decoder, `target` the original norm's rows on kept channels."""
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
    """A norm's output at some positions; a GroupNorm needs whole frames for it, other norms only these positions."""
    if norm.spec.groups is not None:
        return gather_rows(norm(x), positions)
    return norm(gather_rows(x, positions))


def original_normed(norm: Norm, name: str, rows: RecordedRows, given: Tensor) -> Float[Tensor, "N C"]:
    """The output of an original's norm for the rows `given`; that of a GroupNorm was recorded."""
    return rows.outputs[name] if norm.spec.groups is not None else norm(given)
