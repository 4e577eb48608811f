"""How each kind of block is solved: which of its layers, in which order, from which rows.

Every solver reads what the new decoder feeds the block and the recorded rows of the original, fits one layer
after another and writes the weights, so that a layer sees what those before it have become.

Reference: flashvaed_cli/README.md, "Method".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flashvaed_cli.decoders.modules.blocks import Attention, Chain, ConvBlock, Downsample, Head, ResBlock, Upsample
from flashvaed_cli.decoders.modules.naf_blocks import Branch, CellHead, CellStem, Ista, Naf
from flashvaed_cli.decoders.modules.norms import FrameGroupNorm, Norm
from flashvaed_cli.decoders.modules.operators import (
    Conv,
    LowRankConv3d,
    SeparableConv3d,
    dense_kernel,
)
from flashvaed_cli.decoders.modules.shuffle_blocks import ShuffleUpsample
from flashvaed_cli.surgery.activations import ActivationStore
from flashvaed_cli.surgery.attention_fit import set_collapsed
from flashvaed_cli.surgery.channel_fit import ChannelFit
from flashvaed_cli.surgery.layer_fit import (
    DenseFit,
    FitSettings,
    GainFit,
    LayerError,
    LayerFit,
    LinearFit,
    LowRankFit,
    MeasuredOnly,
    SeparableLayerFit,
    num_taps,
    rows_for,
)
from flashvaed_cli.surgery.recording import BLOCK, BYPASS_GAP, RecordedRows
from flashvaed_cli.surgery.rows import dense_rows_per_clip, finer_positions, gather_rows
from flashvaed_cli.surgery.transfer import (
    Channels,
    doubled,
    pick,
    residual_channels,
    residual_kernel,
    wide_channels,
)

Clip = Float[Tensor, "_B _C _T _H _W"]

MAX_UNCHANGED_FEATURES = 8192
"""Unchanged dense layers with more inputs per output than this keep their weights: the gram alone takes 512 MiB."""

STUDENT, ROWS = "student", "rows"
"""Names in the store: what the new decoder feeds the block, and the recorded rows of the original."""


@dataclass(frozen=True)
class BlockPair:
    """A block of the original and its successor, with the channels that are left before, inside and behind it."""

    reference: nn.Module
    student: nn.Module
    before: Channels
    inner: Mapping[str, Channels]
    after: Channels
    settings: FitSettings
    store: ActivationStore
    num_clips: int

    def clips(self) -> Iterator[tuple[Clip, RecordedRows]]:
        """Of every clip, what the new decoder feeds the block, and what the original's block gave."""
        for clip in range(self.num_clips):
            yield (
                self.store.load_input(clip, STUDENT),
                RecordedRows.from_tensors(self.store.load(clip, ROWS)),
            )

    def fit_of(self, name: str, before: Channels, after: Channels) -> LayerFit:
        """The fit of one convolution of the block, by the settings' mode and the layer's operator."""
        layer, source = getattr(self.student, name), getattr(self.reference, name)
        if self.settings.mode == "channel":
            return self._channel_fit(layer, source, before, after)
        if isinstance(layer, SeparableConv3d):
            dense = None
            if not isinstance(source, SeparableConv3d):
                dense = pick(pick(dense_kernel(source), after, 0), before, 1)
            return SeparableLayerFit(layer, dense_weight=dense, settings=self.settings)
        if isinstance(layer, LowRankConv3d):
            dense = pick(pick(dense_kernel(source), after, 0), before, 1)
            return LowRankFit(layer, dense_weight=dense, settings=self.settings)
        if layer.spec == source.spec and layer.spec.in_width * num_taps(layer.spec) > MAX_UNCHANGED_FEATURES:
            return MeasuredOnly(layer)
        return DenseFit([layer], settings=self.settings)

    def _channel_fit(self, layer: Conv, source: Conv | None, before: Channels, after: Channels) -> LayerFit:
        if source is None:  # an identity that has become a 1x1
            assert isinstance(self.reference, ResBlock | Chain)
            width = (self.reference.conv1 if isinstance(self.reference, ResBlock) else self.reference).spec.in_width
            eye = torch.eye(width, device=layer.weight.device)
            kernel, bias = eye[:, :, None, None, None], eye.new_zeros(width)
        else:
            kernel, bias = dense_kernel(source), source.bias
        return ChannelFit(layer, kernel, bias, before=before, after=after, settings=self.settings)

    def targets(self, rows: RecordedRows, name: str, after: Channels) -> Tensor:
        """What the fit of a layer aims at: the original's outputs, or in channel mode its inputs."""
        return rows.inputs[name] if self.settings.mode == "channel" else pick(rows.outputs[name], after, 1)


def rows_by_layer(pair: BlockPair) -> dict[str, int]:
    """Positions of a clip by layer: what the neediest fit wants; a temporal upsampler has a grid of its own."""
    if isinstance(pair.student, CellStem | CellHead):
        return {}
    if isinstance(pair.student, Naf | Ista):
        parts = [part.contract for part in pair.student.modules() if isinstance(part, Branch)]
        return {BLOCK: max(rows_for([layer], pair.num_clips) for layer in parts)}
    layers = {name: layer for name, layer in pair.student.named_children() if isinstance(layer, Conv)}
    main = [layer for name, layer in layers.items() if name not in ("temporal", "shortcut")]
    groups = [[layer] for layer in main]
    if _is_joint(pair):
        groups.append([layers[_last_of_path(pair.student)], layers["shortcut"]])
    wanted = [rows_for(group, pair.num_clips) for group in groups]
    if isinstance(pair.student, Attention):
        wanted = [dense_rows_per_clip(pair.student.qkv.in_features, pair.num_clips)]
    norms = [name for name, norm in pair.reference.named_children() if isinstance(norm, FrameGroupNorm)]
    counts = dict.fromkeys([*layers, *norms, BLOCK], max(wanted))
    if "temporal" in layers:
        counts["temporal"] = rows_for([layers["temporal"]], pair.num_clips)
    return counts


def _normed_rows(norm: Norm, x: Clip, positions: Tensor) -> Float[Tensor, "N C"]:
    """A norm's output at some positions: of them alone, or of a GroupNorm from whole frames."""
    if isinstance(norm, FrameGroupNorm):
        return gather_rows(norm(x), positions)
    return norm(gather_rows(x, positions))


def _original_normed(norm: Norm, name: str, rows: RecordedRows, given: Tensor) -> Float[Tensor, "N C"]:
    """What a norm of the original made of the rows `given`; of a GroupNorm it was recorded."""
    return rows.outputs[name] if isinstance(norm, FrameGroupNorm) else norm(given)


def _solve_gain(
    norm: Norm, pair: BlockPair, read: Callable[[Clip], Clip], target: Callable[[RecordedRows], Tensor]
) -> None:
    """Fit a norm: `read` is what it reads in the new decoder, `target` the original norm's rows on the kept."""
    if norm.gamma is None:
        return  # nothing to fit: the block has all its channels
    fit = GainFit(norm)
    for y, recorded in pair.clips():
        fit.update_normalised(_normed_rows(fit.unit, read(y), recorded.positions[BLOCK]), target(recorded))
    fit.solve_()


def _solve_entering_gain(name: str, old: Norm, new: Norm, pair: BlockPair) -> None:
    """Fit the norm that reads a block's input."""
    _solve_gain(
        new,
        pair,
        lambda y: y,
        lambda rows: pick(_original_normed(old, name, rows, rows.inputs[BLOCK]), pair.before, 1),
    )


def _solve_layer(
    fit: LayerFit,
    pair: BlockPair,
    name: str,
    read: Callable[[Clip], list[Clip]],
    target: Callable[[Clip, RecordedRows], Tensor],
) -> LayerError:
    """Fit a layer: `read` is what it reads in the new decoder, `target` what it should give at the rows of `name`."""
    for y, recorded in pair.clips():
        if name in recorded.positions:
            fit.update(read(y), target(y, recorded), recorded.positions[name])
    return fit.solve_()


def _is_joint(pair: BlockPair) -> bool:
    """Whether the last convolution of a block's main path and its shortcut are solved as one."""
    block = pair.student
    return (
        isinstance(block, ResBlock | Chain)
        and block.shortcut is not None
        and not isinstance(getattr(block, _last_of_path(block)), SeparableConv3d)
        and pair.settings.mode == "full"
    )


def _last_of_path(block: nn.Module) -> str:
    return block.spec.path[-1] if isinstance(block, Chain) else "conv2"


def _solve_resblock(pair: BlockPair, address: str) -> list[LayerError]:
    old, new = pair.reference, pair.student
    assert isinstance(old, ResBlock) and isinstance(new, ResBlock)

    def at_block(y: Clip, rows: RecordedRows) -> Tensor:
        return gather_rows(y, rows.positions[BLOCK])

    def inner(y: Clip) -> Clip:
        return new.conv1(F.silu(new.norm1(y)))

    def hidden(y: Clip) -> Clip:
        return F.silu(new.norm2(inner(y)))

    kept_inside = pair.inner["conv1"]
    _solve_entering_gain("norm1", old.norm1, new.norm1, pair)
    errors = [
        _solve_layer(
            pair.fit_of("conv1", pair.before, kept_inside),
            pair,
            "conv1",
            lambda y: [F.silu(new.norm1(y))],
            lambda _, rows: pair.targets(rows, "conv1", kept_inside),
        )
    ]
    _solve_gain(
        new.norm2,
        pair,
        inner,
        lambda rows: pick(_original_normed(old.norm2, "norm2", rows, rows.outputs["conv1"]), kept_inside, 1),
    )
    if pair.settings.mode == "channel":
        second = pair.fit_of("conv2", kept_inside, pair.after)
        errors.append(_solve_layer(second, pair, "conv2", lambda y: [hidden(y)], lambda _, rows: rows.inputs["conv2"]))
        if new.shortcut is not None:
            across = pair.fit_of("shortcut", pair.before, pair.after)
            errors.append(
                _solve_layer(
                    across,
                    pair,
                    BLOCK,
                    lambda y: [new.before_shortcut(y)],
                    lambda _, rows: old.before_shortcut(rows.inputs[BLOCK]),
                )
            )
        return errors
    if _is_joint(pair):
        assert new.shortcut is not None
        joint = DenseFit([new.conv2, new.shortcut], settings=pair.settings)
        errors.append(
            _solve_layer(
                joint,
                pair,
                BLOCK,
                lambda y: [hidden(y), new.before_shortcut(y)],
                lambda _, rows: pick(rows.outputs[BLOCK], pair.after, 1),
            )
        )
        return errors

    def beside_shortcut(y: Clip, rows: RecordedRows) -> Tensor:
        across = y if new.shortcut is None else new.shortcut(new.before_shortcut(y))
        return pick(rows.outputs[BLOCK], pair.after, 1) - at_block(across, rows)

    second = pair.fit_of("conv2", kept_inside, pair.after)
    errors.append(_solve_layer(second, pair, BLOCK, lambda y: [hidden(y)], beside_shortcut))
    return errors


def _solve_chain(pair: BlockPair, address: str) -> list[LayerError]:
    """Every layer for what the original's gave before its activation; the last one and the shortcut for their sum."""
    old, new = pair.reference, pair.student
    assert isinstance(old, Chain) and isinstance(new, Chain)
    path, ends = new.spec.path, (pair.before, *pair.inner.values(), pair.after)

    def reads(y: Clip, depth: int) -> Clip:
        for conv in new.convolutions()[:depth]:
            y = F.relu(conv(y))
        return y

    errors = []
    for depth, name in enumerate(path[:-1]):
        before, after = ends[depth : depth + 2]
        errors.append(
            _solve_layer(
                pair.fit_of(name, before, after),
                pair,
                name,
                lambda y, depth=depth: [reads(y, depth)],
                lambda _, rows, name=name, after=after: pair.targets(rows, name, after),
            )
        )
    last = path[-1]
    if pair.settings.mode == "channel":
        fit = pair.fit_of(last, ends[-2], pair.after)
        errors.append(_solve_layer(fit, pair, last, lambda y: [reads(y, -1)], lambda _, rows: rows.inputs[last]))
        if new.spec.shortcut is not None:
            across = pair.fit_of("shortcut", pair.before, pair.after)
            errors.append(_solve_layer(across, pair, BLOCK, lambda y: [y], lambda _, rows: rows.inputs[BLOCK]))
        return errors

    def whole(rows: RecordedRows) -> Tensor:
        across = rows.inputs[BLOCK] if old.shortcut is None else rows.outputs["shortcut"]
        return pick(rows.outputs[last] + across, pair.after, 1)

    if _is_joint(pair):
        joint = DenseFit(
            [new.convolutions()[-1], *([] if new.shortcut is None else [new.shortcut])], settings=pair.settings
        )
        errors.append(_solve_layer(joint, pair, BLOCK, lambda y: [reads(y, -1), y], lambda _, rows: whole(rows)))
        return errors

    def beside_shortcut(y: Clip, rows: RecordedRows) -> Tensor:
        return whole(rows) - gather_rows(y if new.shortcut is None else new.shortcut(y), rows.positions[BLOCK])

    fit = pair.fit_of(last, ends[-2], pair.after)
    errors.append(_solve_layer(fit, pair, BLOCK, lambda y: [reads(y, -1)], beside_shortcut))
    return errors


def _solve_attention(pair: BlockPair, address: str) -> list[LayerError]:
    old, new = pair.reference, pair.student
    assert isinstance(old, Attention) and isinstance(new, Attention)

    def normed(y: Clip, rows: RecordedRows) -> Tensor:
        return _normed_rows(new.norm, y, rows.positions[BLOCK])

    _solve_entering_gain("norm", old.norm, new.norm, pair)
    if pair.settings.mode == "channel":
        return []
    is_narrower = new.proj.in_features != old.proj.in_features
    layer = new.qkv
    if is_narrower:  # fitted at the original's inner width, then collapsed
        layer = nn.Linear(new.qkv.in_features, old.qkv.out_features).to(new.qkv.weight.device).requires_grad_(False)
        layer.weight.copy_(pick(old.qkv.weight, pair.before, 1))
        layer.bias.copy_(old.qkv.bias)
    qkv = LinearFit(layer, f"{address}.qkv", settings=pair.settings)
    for y, rows in pair.clips():
        qkv.update(normed(y, rows), old.qkv(_original_normed(old.norm, "norm", rows, rows.inputs[BLOCK])))
    errors = [qkv.solve_()]
    if is_narrower:
        outer, bias = pick(old.proj.weight, pair.after, 0), pick(old.proj.bias, pair.after, 0)
        set_collapsed(new, layer.weight, layer.bias, outer, bias)
    proj = LinearFit(new.proj, f"{address}.proj", settings=pair.settings)
    for y, rows in pair.clips():
        at = rows.positions[BLOCK]
        target = pick(rows.outputs[BLOCK], pair.after, 1) - gather_rows(y, at)
        proj.update(_mixed(new, y)[at.to(y.device)], target)
    return [*errors, proj.solve_()]


def _mixed(block: Attention, y: Clip) -> Float[Tensor, "P I"]:
    """What the output projection reads: one row per position `[B, T, H, W]`."""
    seen: list[Tensor] = []
    handle = block.proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        block(y)
    finally:
        handle.remove()
    return seen[0].flatten(0, 1)  # [BT, HW, I] -> [P, I]


def _solve_upsample(pair: BlockPair, address: str) -> list[LayerError]:
    old, new = pair.reference, pair.student
    assert isinstance(old, Upsample) and isinstance(new, Upsample)
    errors = []
    if new.temporal is not None and any("temporal" in rows.positions for _, rows in pair.clips()):
        assert old.temporal is not None
        both_halves = doubled(pair.before, old.temporal)
        errors.append(
            _solve_layer(
                pair.fit_of("temporal", pair.before, both_halves),
                pair,
                "temporal",
                lambda y: [y if new.grows_first else y[:, :, 1:]],
                lambda _, rows: pair.targets(rows, "temporal", both_halves),
            )
        )

    def enlarged(y: Clip) -> list[Clip]:
        return [new.enlarge(new.double_frames(y))]

    spatial = pair.fit_of("spatial", pair.before, pair.after)

    def target(_: Clip, rows: RecordedRows) -> Tensor:
        return _with_gap(pair.targets(rows, "spatial", pair.after), pair, rows)

    errors.append(_solve_layer(spatial, pair, "spatial", enlarged, target))
    return errors


def _solve_shuffle(pair: BlockPair, address: str) -> list[LayerError]:
    """The layer gives what the original's gave; and the original's residual too, where it has become part of it."""
    old, new = pair.reference, pair.student
    assert isinstance(old, ShuffleUpsample) and isinstance(new, ShuffleUpsample)
    wide = wide_channels(pair.after, old.spec.cell)
    if pair.settings.mode == "channel":
        kernel = dense_kernel(old.conv)
        if old.spec.residual and not new.spec.residual:
            kernel = kernel + residual_kernel(old.spec).to(kernel)
        fit: LayerFit = ChannelFit(
            new.conv, kernel, old.conv.bias, before=pair.before, after=wide, settings=pair.settings
        )
        return [_solve_layer(fit, pair, "conv", lambda y: [y], lambda _, rows: rows.inputs["conv"])]

    def target(y: Clip, rows: RecordedRows) -> Tensor:
        wanted = rows.outputs["conv"]
        if old.spec.residual:
            wanted = wanted + rows.inputs["conv"][:, residual_channels(old.spec).to(wanted.device)]
        wanted = pick(wanted, wide, 1)
        if new.spec.residual:
            own = gather_rows(y, rows.positions["conv"])
            wanted = wanted - own[:, residual_channels(new.spec).to(wanted.device)]
        return _with_gap(wanted, pair, rows)

    return [_solve_layer(pair.fit_of("conv", pair.before, wide), pair, "conv", lambda y: [y], target)]


def _solve_downsample(pair: BlockPair, address: str) -> list[LayerError]:
    """A strided kernel reads what an unstrided one reads at every second position of the finer grid."""
    old, new = pair.reference, pair.student
    assert isinstance(old, Downsample) and isinstance(new, Downsample)
    if pair.settings.mode == "channel":
        return []
    spatial = pair.fit_of("spatial", pair.before, pair.after)
    for y, rows in pair.clips():
        centres = finer_positions(rows.positions["spatial"], y.shape, step=(1, 2, 2), first=(0, 1, 1))
        spatial.update([y], pick(rows.outputs["spatial"], pair.after, 1), centres)
    errors = [spatial.solve_()]
    if new.temporal is None or not any("temporal" in rows.positions for _, rows in pair.clips()):
        return errors
    temporal = pair.fit_of("temporal", pair.after, pair.after)
    for y, rows in pair.clips():
        if "temporal" in rows.positions:
            halved = new.halve_size(y)
            last = finer_positions(rows.positions["temporal"], halved.shape, step=(2, 1, 1), first=(2, 0, 0))
            temporal.update([halved], pick(rows.outputs["temporal"], pair.after, 1), last)
    return [*errors, temporal.solve_()]


def _solve_head(pair: BlockPair, address: str) -> list[LayerError]:
    old, new = pair.reference, pair.student
    assert isinstance(old, Head) and isinstance(new, Head)
    if old.norm is not None and new.norm is not None:
        _solve_entering_gain("norm", old.norm, new.norm, pair)
    fit = pair.fit_of("conv", pair.before, None)
    return [
        _solve_layer(
            fit, pair, "conv", lambda y: [new.before_conv(y)], lambda _, rows: pair.targets(rows, "conv", None)
        )
    ]


def _solve_conv(pair: BlockPair, address: str) -> list[LayerError]:
    new = pair.student
    assert isinstance(new, ConvBlock)
    fit = pair.fit_of("conv", pair.before, pair.after)

    def target(_: Clip, rows: RecordedRows) -> Tensor:
        return _with_gap(pair.targets(rows, "conv", pair.after), pair, rows)

    return [_solve_layer(fit, pair, "conv", lambda y: [new.before_conv(y)], target)]


def _with_gap(wanted: Tensor, pair: BlockPair, rows: RecordedRows) -> Tensor:
    """A target, with what the bypass that is added to the layer's output owes."""
    owes = pair.settings.mode == "full" and BYPASS_GAP in rows.outputs
    return wanted + rows.outputs[BYPASS_GAP] if owes else wanted


def _solve_naf(pair: BlockPair, address: str) -> list[LayerError]:
    """Each branch's last layer gives what the original's block gave, less what else the new block adds up."""
    new = pair.student
    assert isinstance(new, Naf)
    return _solve_gates(new, pair, lambda y, rows: (y, rows.outputs[BLOCK]))


def _solve_ista(pair: BlockPair, address: str) -> list[LayerError]:
    """One naf block after another; the latents enter both decoders alike, so the original can be run beside."""
    old, new = pair.reference, pair.student
    assert isinstance(old, Ista) and isinstance(new, Ista)

    def reading(place: str) -> Callable[[Clip, RecordedRows], tuple[Clip, Tensor]]:
        def read(y: Clip, rows: RecordedRows) -> tuple[Clip, Tensor]:
            entering = next(given for at, given, _ in new.walk(y) if at == place)
            wanted = next(given for at, given in _unit_outputs(old, y) if at == place)
            return entering, gather_rows(wanted, rows.positions[BLOCK])

        return read

    errors = []
    for place in new.spec.units:
        unit = new.get_submodule(place)
        assert isinstance(unit, Naf)
        errors += _solve_gates(unit, pair, reading(place))
    return errors


def _unit_outputs(block: Ista, y: Clip) -> Iterator[tuple[str, Clip]]:
    """What each naf block of a bottleneck gives by itself."""
    for place, entering, _ in block.walk(y):
        yield place, block.get_submodule(place)(entering)


def _solve_gates(
    unit: Naf, pair: BlockPair, read: Callable[[Clip, RecordedRows], tuple[Clip, Tensor]]
) -> list[LayerError]:
    """Fit the last layer of every branch of a naf block.

    Args:
        read: of a clip, the block's input in the new decoder, and the original block's output at the recorded rows.
    """
    if pair.settings.mode == "channel":
        return []
    errors, start = [], 0
    for index, width in enumerate(branch.width for branch in unit.spec.branches):
        branch = unit.branches[index]
        assert isinstance(branch, Branch) and isinstance(branch.contract, Conv)
        fit = DenseFit([branch.contract], settings=pair.settings)
        for y, rows in pair.clips():
            entering, wanted = read(y, rows)
            mixed, at = unit.mixed(entering), rows.positions[BLOCK]
            target = wanted[:, start : start + width]
            if unit.spec.residual:
                target = target - gather_rows(mixed, at)[:, start : start + width]
            fit.update([branch.inner(unit.parts(mixed)[index])], target, at)
        errors.append(fit.solve_())
        start += width
    return errors


def _solve_cells(pair: BlockPair, address: str) -> list[LayerError]:
    """The pixels' layers keep their weights: what they read has been fitted to what they were made for."""
    return []


BLOCK_SOLVERS: dict[str, Callable[[BlockPair, str], list[LayerError]]] = {
    "resblock": _solve_resblock,
    "chain": _solve_chain,
    "attention": _solve_attention,
    "upsample": _solve_upsample,
    "shuffle_upsample": _solve_shuffle,
    "downsample": _solve_downsample,
    "head": _solve_head,
    "conv": _solve_conv,
    "naf": _solve_naf,
    "ista": _solve_ista,
    "cell_stem": _solve_cells,
    "cell_head": _solve_cells,
}
