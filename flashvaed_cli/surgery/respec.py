"""New specs from old: narrower widths for kept channels, other operators for stages. No weights here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from flashvaed_cli.decoders.spec.blocks import (
    AttentionSpec,
    Block,
    BlockSpec,
    CellUpsampleSpec,
    ChainSpec,
    ConvBlockSpec,
    HeadSpec,
    ResBlockSpec,
    ShuffleUpsampleSpec,
    UpsampleSpec,
)
from flashvaed_cli.decoders.spec.coders import DecoderSpec, StageSpec
from flashvaed_cli.decoders.spec.convolutions import point_conv
from flashvaed_cli.decoders.spec.groups import Kept, channel_groups, input_tensors, tensor_widths
from flashvaed_cli.decoders.spec.layers import ConvSpec, NormSpec
from flashvaed_cli.decoders.spec.naf_blocks import IstaSpec, NafSpec
from flashvaed_cli.decoders.spec.operators import OPERATOR_FACTS, Operator
from flashvaed_cli.errors import SpecError

NOTHING_TO_CONVERT = "has nothing to convert: no residual block, nor a layer after a shuffle"


def narrowed_spec(spec: DecoderSpec, kept: Kept) -> DecoderSpec:
    """The spec with only the kept channels.

    A residual block whose input or output was narrowed gets a 1x1 shortcut, as in the paper, also where
    the kept sets are equal: it can then carry what the missing channels would have added.

    Raises:
        SpecError: `kept` names a tensor that cannot be pruned, or a channel that does not exist or comes twice.
    """
    widths = tensor_widths(spec)
    runs = {tensor: group.run for group in channel_groups(spec) for tensor in group.tensors}
    for tensor, channels in kept.items():
        if tensor not in widths:
            raise SpecError(f"no prunable tensor '{tensor}' in this decoder")
        if not channels or len(set(channels)) < len(channels) or not set(channels) <= set(range(widths[tensor])):
            raise SpecError(f"{tensor} has {widths[tensor]} channels, cannot keep {list(channels)}")
        if not _keeps_runs_whole(channels, runs[tensor]):
            raise SpecError(
                f"{tensor} is normalised in groups of {runs[tensor]} channels, which stay or go together; cannot keep "
                f"{list(channels)}"
            )
    inputs = input_tensors(spec)
    changed: dict[str, BlockSpec] = {}
    for address, block in spec.blocks():
        source = inputs[address]
        before = kept.get(source) if source else None
        after = kept.get(address)
        inner = {name: len(kept[at]) for name in block.inner_tensors if (at := f"{address}.{name}") in kept}
        if before or inner or after:
            changed[address] = NARROWED[block.kind](block, _Widths(_count(before), inner, _count(after)))
    return spec.with_blocks(changed)


def spec_of_widths(spec: DecoderSpec, widths: Mapping[str, int]) -> DecoderSpec:
    """The spec with channel groups narrowed to widths, as pruning to them gives it, whichever channels are kept.

    Args:
        widths: by the name of a group; groups that are absent or at their full width stay as they are.
    Raises:
        SpecError: a group is unknown, or cannot have that width.
    """
    groups = {group.name: group for group in channel_groups(spec)}
    if unknown := [name for name in widths if name not in groups]:
        raise SpecError(f"no channel group '{unknown[0]}' in this decoder; it has {', '.join(groups)}")
    kept: Kept = {}
    for name, width in widths.items():
        if width != groups[name].width:
            kept.update(dict.fromkeys(groups[name].tensors, tuple(range(width))))
    return narrowed_spec(spec, kept)


def _keeps_runs_whole(channels: Sequence[int], run: int) -> bool:
    """Whether channels consist of whole runs of this length, each in order, so that the statistics of a run stay."""
    starts = channels[::run]
    whole = [channel for start in starts for channel in range(start, start + run)]
    return run == 1 or (list(channels) == whole and all(start % run == 0 for start in starts))


def _count(kept: tuple[int, ...] | None) -> int | None:
    return None if kept is None else len(kept)


class _Widths(NamedTuple):
    """Number of kept channels before a block, in the tensors inside it, and after it; None or absent: all."""

    before: int | None
    inner: Mapping[str, int]
    after: int | None


def _narrow_resblock(block: ResBlockSpec, widths: _Widths) -> ResBlockSpec:
    inner = widths.inner.get("conv1")
    conv1 = _resized(block.conv1, widths.before, inner)
    conv2 = _resized(block.conv2, inner, widths.after)
    shortcut = block.shortcut
    if widths.before or widths.after:
        shortcut = ConvSpec(operator="pointwise", in_width=conv1.in_width, out_width=conv2.out_width, kernel=(1, 1, 1))
    norm1, norm2 = _narrowed_norms(block, {"norm1": conv1.in_width, "norm2": conv2.in_width})
    changed = {"conv1": conv1, "conv2": conv2, "shortcut": shortcut, "norm": norm1}
    return ResBlockSpec(**{**dict(block), **changed, "norm2": None if norm2 == norm1 else norm2})


def _narrow_chain(block: ChainSpec, widths: _Widths) -> ChainSpec:
    ends = (widths.before, *(widths.inner.get(name) for name in block.inner_tensors), widths.after)
    convs = {name: _resized(block.layers[name], *ends[i : i + 2]) for i, name in enumerate(block.path)}
    shortcut = block.shortcut
    if widths.before or widths.after:
        width, out_width = convs["conv1"].in_width, convs[block.path[-1]].out_width
        shortcut = ConvSpec(operator="pointwise", in_width=width, out_width=out_width, kernel=(1, 1, 1))
    return ChainSpec(**{**dict(block), **convs, "shortcut": shortcut})


def _narrow_attention(block: AttentionSpec, widths: _Widths) -> AttentionSpec:
    width = widths.after or block.width
    norm = block.norm if block.norm.groups is None else block.norm.narrowed(block.width, width)
    return block.model_copy(update={"width": width, "norm": norm})


def _narrow_upsample(block: UpsampleSpec, widths: _Widths) -> UpsampleSpec:
    temporal = block.temporal and _resized(block.temporal, widths.before, widths.before and 2 * widths.before)
    changed = {"temporal": temporal, "spatial": _resized(block.spatial, widths.before, widths.after)}
    return block.model_copy(update=changed)


def _narrow_shuffle(block: ShuffleUpsampleSpec, widths: _Widths) -> ShuffleUpsampleSpec:
    """A residual becomes part of the kernel."""
    conv = _resized(block.conv, widths.before, widths.after and widths.after * block.cell)
    return ShuffleUpsampleSpec(conv=conv, factor=block.factor, keeps=block.keeps)


def _narrow_cells(block: CellUpsampleSpec, widths: _Widths) -> CellUpsampleSpec:
    """A residual becomes part of the kernel; what it is for the first frame of a video, a layer of its own."""
    conv = _resized(block.conv, widths.before, widths.after and widths.after * block.cell)
    own = block.factor[0] > 1 and (block.residual or block.first is not None)
    first = point_conv(conv.in_width, conv.out_width // block.factor[0]) if own else None
    return CellUpsampleSpec(conv=conv, factor=block.factor, residual=False, first=first)


def _narrow_head(block: HeadSpec, widths: _Widths) -> HeadSpec:
    conv = _resized(block.conv, widths.before, widths.after)
    norm = None if block.norm is None else _narrowed_norms(block, {"norm": conv.in_width})[0]
    return block.model_copy(update={"conv": conv, "norm": norm})


def _narrow_single(block: ConvBlockSpec, widths: _Widths) -> ConvBlockSpec:
    return block.model_copy(update={"conv": _resized(block.conv, widths.before, widths.after)})


def _narrow_gates(block: NafSpec | IstaSpec, widths: _Widths) -> BlockSpec:
    """Fewer values with their gates; the channels of the stream stay."""
    layers: dict[str, ConvSpec] = {}
    for name, width in widths.inner.items():
        inner = block.inner_tensors[name]
        layers[inner.producer] = _resized(block.layers[inner.producer], None, 2 * width)
        layers[inner.reader.layer] = _resized(block.layers[inner.reader.layer], width, None)
    return block.with_layers(layers)


def _refuse_cells(block: Block, widths: _Widths) -> NoReturn:
    raise SpecError("the ends of this decoder keep their channels")


def _refuse(block: Block, widths: _Widths) -> NoReturn:
    raise SpecError("encoders are not pruned")


NARROWED: dict[str, Callable[[Any, _Widths], BlockSpec]] = {
    "conv": _narrow_single,
    "resblock": _narrow_resblock,
    "chain": _narrow_chain,
    "attention": _narrow_attention,
    "upsample": _narrow_upsample,
    "shuffle_upsample": _narrow_shuffle,
    "downsample": _refuse,
    "strided_downsample": _refuse,
    "unshuffle_downsample": _refuse,
    "cell_upsample": _narrow_cells,
    "cell_downsample": _refuse,
    "head": _narrow_head,
    "naf": _narrow_gates,
    "ista": _narrow_gates,
    "cell_stem": _refuse,
    "cell_head": _refuse_cells,
}
"""A block of each kind with the kept channels."""


def _narrowed_norms(block: Block, kept: Mapping[str, int]) -> list[NormSpec]:
    """The norms over the kept channels, with a gain to make up for the missing ones."""
    return [norm.narrowed(width, kept[name]) for name, (norm, width) in block.norms.items()]


def _resized(layer: ConvSpec, in_width: int | None, out_width: int | None) -> ConvSpec:
    resized = layer.model_copy(
        update={"in_width": in_width or layer.in_width, "out_width": out_width or layer.out_width}
    )
    rank = None if layer.rank is None else min(layer.rank, full_rank(resized))
    return resized.model_copy(update={"rank": rank})


def full_rank(layer: ConvSpec) -> int:
    """The largest rank that a layer's kernel can have."""
    return min(layer.out_width, layer.in_width * layer.kernel[0])


def with_time_rank(spec: DecoderSpec, ratio: float) -> DecoderSpec:
    """The spec with every temporal upsampler's kernel as a product of a fraction of its full rank, rounded up.

    Raises:
        SpecError: the decoder has none, or a product of that rank would cost more than the kernel.
    """
    changed: dict[str, BlockSpec] = {}
    for address, block in spec.blocks():
        if not isinstance(block, UpsampleSpec) or block.temporal is None:
            continue
        layer = block.temporal
        rank = math.ceil(ratio * full_rank(layer))
        low = ConvSpec(**{**layer.model_dump(), "operator": "lowrank3d", "rank": rank})
        dense = ConvSpec(**{**layer.model_dump(), "operator": "causal3d", "rank": None})
        if low.parameter_count >= dense.parameter_count:
            raise SpecError(
                f"{address}.temporal: rank {rank} of {full_rank(layer)} costs more than the kernel itself; "
                "give a smaller --time-rank, or leave it out"
            )
        changed[address] = block.model_copy(update={"temporal": low})
    if not changed:
        shuffling = [
            address
            for address, block in spec.blocks()
            if isinstance(block, ShuffleUpsampleSpec | CellUpsampleSpec) and block.factor[0] > 1
        ]
        raise SpecError(
            f"--time-rank factorises layers that only double the frames, such as Wan's time_conv; this decoder doubles "
            f"them by shuffling channels of {', '.join(shuffling)} into time and space at once, which cannot be "
            "factorised: leave --time-rank out"
            if shuffling
            else "this decoder has no temporal upsampler: leave --time-rank out"
        )
    return spec.with_blocks(changed)


def converted_spec(spec: DecoderSpec, stage_operators: Mapping[str, Operator]) -> DecoderSpec:
    """The spec with the main convolutions of some stages as another operator.

    Shortcuts, resamplers, the entry and the head stay as they are (arXiv 2602.19161, section 3.2).

    Raises:
        SpecError: a stage is unknown or has no main convolution, or an operator would have to add taps.
    """
    changed: dict[str, BlockSpec] = {}
    for name, operator in stage_operators.items():
        names = [stage.name for stage in spec.stages]
        if name not in names:
            raise SpecError(f"no stage '{name}' in this decoder; it has {', '.join(names)}")
        layers = main_layers(spec.stage(name))
        if not layers:
            raise SpecError(f"stage '{name}' {NOTHING_TO_CONVERT}")
        for address, (block, main) in layers.items():
            converted = {one: _with_operator(block.layers[one], operator, f"{address}.{one}") for one in main}
            changed[address] = block.with_layers(converted)
    return spec.with_blocks(changed)


def main_layers(stage: StageSpec) -> dict[str, tuple[ResBlockSpec | ConvBlockSpec, tuple[str, ...]]]:
    """The blocks of a stage whose operators are converted, by address, and the names of those layers.

    Both convolutions of each residual block; in a stage that begins with a shuffle, as SeedVR2 has, the layer on the
    grown frames.
    """
    has_shuffle = isinstance(stage.blocks[0], ShuffleUpsampleSpec)
    found: dict[str, tuple[ResBlockSpec | ConvBlockSpec, tuple[str, ...]]] = {}
    for index, block in enumerate(stage.blocks):
        if isinstance(block, ResBlockSpec):
            found[f"{stage.name}.{index}"] = (block, ("conv1", "conv2"))
        elif has_shuffle and isinstance(block, ConvBlockSpec):
            found[f"{stage.name}.{index}"] = (block, ("conv",))
    return found


def _with_operator(layer: ConvSpec, operator: Operator, address: str) -> ConvSpec:
    if layer.operator == operator:
        return layer
    if operator == "frame2d" and layer.operator == "pointwise":
        return layer
    targets = sorted(name for name, facts in OPERATOR_FACTS.items() if layer.operator in facts.made_from)
    if operator not in targets:
        possible = ", ".join(targets) or "nothing"
        raise SpecError(f"{address} is {layer.operator}: it converts to {possible}, not to {operator}")
    if operator != "frame2d":
        return layer.model_copy(update={"operator": operator})
    if layer.kernel[1:] == (1, 1):  # what remains of a kernel in time alone
        operator = "pointwise"
    changed = {"operator": operator, "kernel": (1, *layer.kernel[1:]), "time_padding": "zeros"}
    return ConvSpec(**{**dict(layer), **changed})
