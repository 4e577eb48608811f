"""Peak memory of a decoder, predicted from its spec alone.

It is the sum of all that lives at the worst moment of a step: the weights, the state of every causal layer (in all
tiles), the frames of this step and of the one before, and the tensors of the worst block. The last follow the blocks'
code with plain operators; operators that need fewer temporaries stay below the prediction.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Literal

from flashvaed_cli.decoders.predict import attention
from flashvaed_cli.decoders.predict.bands import BandShape
from flashvaed_cli.decoders.predict.cost import Grid, stage_costs
from flashvaed_cli.decoders.predict.lookahead import first_chunk, latents_per_step, widest_window
from flashvaed_cli.decoders.predict.tiling import TileLayout, require_tiles, split_addresses, tile_layout
from flashvaed_cli.decoders.predict.winograd_strips import is_worthwhile, working_elements
from flashvaed_cli.decoders.spec.addresses import split_block
from flashvaed_cli.decoders.spec.blocks import (
    AttentionSpec,
    BlockSpec,
    CellUpsampleSpec,
    ChainSpec,
    ConvBlockSpec,
    HeadSpec,
    ResBlockSpec,
    ShuffleUpsampleSpec,
    UpsampleSpec,
)
from flashvaed_cli.decoders.spec.coders import BypassSpec, DecoderSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec, NormSpec
from flashvaed_cli.decoders.spec.naf_blocks import COLOURS, CellHeadSpec, IstaSpec, NafSpec

DType = Literal["float16", "bfloat16", "float32", "float64"]
ITEM_BYTES: dict[DType, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
FIXED_BYTES = 32 * 2**20  # code and scratch memory of the kernels, whatever the size
UNROLLED_BELOW = 20480  # channels x frames x rows of a float32 input up to which torch unrolls 3D patches
GAP_SHARE = 0.08  # the allocator's rounding and gaps, as a share of the tensors: 7 % at 1080p


@dataclass(frozen=True)
class MemoryFormat:
    """What the prediction must know about a run.

    `has_kernels` is False for a half-precision `dtype` that the processor has no convolutions for: torch then unrolls
    patches, and the prediction is a bound for plain operators, up to three times the truth for others.
    `in_bands`: light blocks run in bands of rows, as they do on the CPU unless they are compiled. `keeps_state`: layers
    keep what a later step needs, which a clip that is decoded at once does not.
    """

    dtype: DType = "float32"
    channels_last: bool = True
    has_kernels: bool = True
    in_bands: bool = False
    keeps_state: bool = True

    @property
    def item_bytes(self) -> int:
        """Bytes of an element."""
        return ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Passage:
    """One block in one step: the frames, rows and columns of its input, and the frames of its output."""

    address: str
    block: BlockSpec
    frames: int
    rows: int
    columns: int
    frames_after: int

    @property
    def area(self) -> int:
        """Rows times columns."""
        return self.rows * self.columns

    def after(self) -> Passage:
        """The same with the sizes of the output."""
        _, rows, columns = self.block.growth
        return replace(self, frames=self.frames_after, rows=rows * self.rows, columns=columns * self.columns)


def passages(spec: DecoderSpec, grid: Grid, *, streams: bool) -> list[Passage]:
    """Every block with the sizes of one step over `grid` latents; `streams`: a later step, else the first."""
    frames, rows, columns = grid
    found = []
    for address, block in spec.blocks():
        frames_after = block.growth[0] * frames if streams else block.grid_after((frames, 1, 1))[0]
        found.append(Passage(address, block, frames, rows, columns, frames_after))
        after = found[-1].after()
        frames, rows, columns = after.frames, after.rows, after.columns
    return found


def predict_peak_bytes(
    spec: DecoderSpec,
    grid: Grid,
    *,
    chunk: int | None = None,
    tile: int | None = None,
    split: str | None = None,
    dtype: DType = "float32",
    channels_last: bool = True,
    has_kernels: bool = True,
    in_bands: bool = False,
    batch: int = 1,
) -> int:
    """Peak memory of decoding in bytes: an upper bound, meant to be close.

    It counts live tensors, on top of a process with torch loaded. The C library's heap can take up to twice that,
    unless `decoders.run.heap` makes it return freed memory, as a runtime with a memory limit does.
    Measured on the CPU only; on CUDA the context and cuDNN's workspaces come on top.

    Args:
        grid: latent frames, height and width of the whole clip.
        chunk: latent frames per step; None: all at once.
        tile: side of a tile in latents; None: whole frames.
        split: first block that runs in tiles; None: the one with the lowest prediction. Unused without `tile`.
        has_kernels, in_bands: see `MemoryFormat`.
        batch: number of clips that are decoded together.
    Raises:
        SpecError: `tile` or `split` does not fit.
    """
    layouts: list[TileLayout | None] = [None]
    if tile is not None:
        require_tiles(spec)
        splits = split_addresses(spec) if split is None else (split,)
        layouts = [tile_layout(spec, grid[1], grid[2], tile=tile, split=name) for name in splits]
    model = MemoryModel(spec, grid, MemoryFormat(dtype, channels_last, has_kernels, in_bands), batch)
    return min(model.predict(chunk or grid[0], layout) for layout in layouts)


class MemoryModel:
    """Predictions for one clip; all that does not depend on the plan is worked out once."""

    def __init__(self, spec: DecoderSpec, grid: Grid, form: MemoryFormat, batch: int = 1) -> None:
        self._spec, self._grid, self._form, self._batch = spec, grid, form, batch
        self._endings = spec.bypassed()
        self._bypasses = {stage.name: stage.bypass for stage in self._endings.values() if stage.bypass is not None}
        self._weights = sum(stage.parameters for stage in stage_costs(spec, (1, 1, 1)))
        self._known: dict[tuple[int, bool], list[Passage]] = {}

    def predict(self, chunk: int, layout: TileLayout | None) -> int:
        """Peak in bytes with `chunk` latent frames per step, tiled as `layout` says (None: whole frames)."""
        num_latents, height, width = self._grid
        chunk = latents_per_step(self._spec, num_latents, chunk)
        streams = chunk < num_latents and self._spec.is_causal
        layout = None if layout is None or layout.num_tiles == 1 else layout
        form = replace(self._form, keeps_state=streams)
        steps = (self._passages(num_frames, later=later) for num_frames, later in self._steps(chunk))
        worst = max(self._worst_block(step, layout, form) for step in steps)
        state = self._state_elements(layout) if streams else 0
        for passage in self._passages(chunk, later=True) if streams and self._spec.grows_state else ():
            grown = _grown_elements(passage.block) * passage.area * num_latents
            num_keys = passage.area * num_latents
            before_and_after = 2 * self._form.item_bytes * grown
            worst = max(worst, _block_bytes(passage, form, num_keys) + before_and_after)
            state += grown
        given_out = 3 * self._frames_alive(chunk, layout) * height * width * self._spec.spatial_factor**2
        tensors = self._form.item_bytes * (self._weights + self._batch * (state + given_out)) + self._batch * worst
        return ceil(tensors * (1 + GAP_SHARE)) + FIXED_BYTES

    def _frames_alive(self, chunk: int, layout: TileLayout | None) -> int:
        """Frames beside those that the worst block makes: of the step before, and of this one where tiles fill them."""
        num_latents, spec = self._grid[0], self._spec
        if chunk >= num_latents:
            return 0 if layout is None else spec.num_frames(num_latents)
        given = spec.num_frames(chunk) + spec.temporal_factor - 1
        if spec.is_causal or spec.sees_whole_clip:
            return 2 * given
        made = spec.num_frames(widest_window(spec, num_latents, chunk))
        return given + (0 if layout is None else made)

    def _steps(self, chunk: int) -> list[tuple[int, bool]]:
        """Latent frames of the first step, and of the later ones; whether it is one of those."""
        num_latents = self._grid[0]
        if not self._spec.is_causal:  # every step is a video of its own
            return [(widest_window(self._spec, num_latents, chunk), False)]
        first = first_chunk(num_latents, chunk)
        return [(first, False), (chunk, True)] if chunk < num_latents else [(first, False)]

    def _worst_block(self, step: list[Passage], layout: TileLayout | None, form: MemoryFormat) -> int:
        if layout is None:
            return self._worst_of(step, form)
        index = next(i for i, passage in enumerate(step) if passage.address == layout.split)
        entering = _elements(step[index]) * form.item_bytes
        tiled = entering + self._worst_of(_at_window(step[index:], layout), form)
        return max(tiled, self._worst_of(step[:index], form))

    def _worst_of(self, run: list[Passage], form: MemoryFormat) -> int:
        """Bytes of the worst block of a run, with the tensor that a bypass holds meanwhile."""
        worst, held = 0, 0
        for passage in run:
            stage, index = split_block(passage.address)
            worst = max(worst, _block_bytes(passage, form) + held)
            bypass = self._bypasses.get(stage)
            if bypass is not None and index == 0:
                held = form.item_bytes * _elements(passage)
            if bypass is not None and passage.address in self._endings:
                worst = max(worst, held + form.item_bytes * _bypass_elements(bypass, passage.after()))
                held = 0
        return worst

    def _state_elements(self, layout: TileLayout | None) -> int:
        whole = self._passages(1, later=True)
        if layout is None:
            return _state_elements(whole)
        index = next(i for i, passage in enumerate(whole) if passage.address == layout.split)
        tiled = _state_elements(_at_window(whole[index:], layout))
        return _state_elements(whole[:index]) + layout.num_tiles * tiled

    def _passages(self, num_latents: int, *, later: bool) -> list[Passage]:
        if (num_latents, later) not in self._known:
            self._known[num_latents, later] = passages(self._spec, (num_latents, *self._grid[1:]), streams=later)
        return self._known[num_latents, later]


def _at_window(rest: list[Passage], layout: TileLayout) -> list[Passage]:
    """The passages on one window instead of the frame."""
    rows, columns = layout.window
    tiled = []
    for passage in rest:
        tiled.append(replace(passage, rows=rows, columns=columns))
        after = tiled[-1].after()
        rows, columns = after.rows, after.columns
    return tiled


def _elements(passage: Passage) -> int:
    return passage.frames * passage.area * passage.block.in_width


def _state_elements(run: Iterable[Passage]) -> int:
    total = 0
    for passage in run:
        for name, layer in passage.block.layers.items():
            _, rows, columns = passage.block.layer_grid(name, (2, passage.rows, passage.columns))
            total += (layer.kernel[0] - 1) * layer.in_width * rows * columns
    return total


def _grown_elements(block: BlockSpec) -> int:
    """Of the state of a position, for each frame so far."""
    return 2 * block.inner_width if isinstance(block, AttentionSpec) and block.grows_state else 0


def _bypass_elements(bypass: BypassSpec, leaving: Passage) -> int:
    """Elements that adding a bypass needs beside its input: the stage's output, and the layer's wide channels."""
    output = leaving.frames * leaving.area * bypass.out_width
    return output + output // bypass.cell_size + (0 if bypass.conv is None else output)


def _block_bytes(passage: Passage, form: MemoryFormat, num_keys: int | None = None) -> int:
    """Bytes of the worst moment of a block, its input and output included.

    Args:
        num_keys: positions that attention sees; None: those of its input.
    """
    block, item = passage.block, form.item_bytes
    entering, positions = _elements(passage) * item, passage.frames * passage.area
    if isinstance(block, AttentionSpec):
        # the normalised frames once more as rows; q, k, v; the mixed values (over a clip joined); projected and added
        joined = block.inner_width if block.context == "clip" else 0
        mixing = attention.working_elements(passage.area, num_keys or positions, block.inner_width) if item == 4 else 0
        return entering + item * (positions * (2 * block.width + 5 * block.inner_width + joined) + mixing)
    if isinstance(block, UpsampleSpec):
        return entering + _upsample_bytes(passage, block, form)
    if isinstance(block, ShuffleUpsampleSpec):
        return entering + _shuffle_bytes(passage, block, form)
    if isinstance(block, CellUpsampleSpec):
        return entering + _cell_bytes(passage, block, form)
    if isinstance(block, ResBlockSpec):
        return entering + _resblock_bytes(block, passage, form)
    if isinstance(block, ChainSpec):
        return entering + _chain_bytes(block, passage, form)
    if isinstance(block, HeadSpec):
        if block.norm is None and block.activation == "none":
            return entering + _conv_bytes(block.conv, passage, form)
        return entering + _normed_conv_bytes(block.norm, block.conv, passage, form)
    if isinstance(block, ConvBlockSpec) and block.entry is not None:
        return entering + 2 * entering + _conv_bytes(block.conv, passage, form)  # normalized, then clamped
    if isinstance(block, NafSpec | IstaSpec):
        return entering + _naf_bytes(block, passage, form)
    if isinstance(block, CellHeadSpec):
        # bands, their sums and differences, and those joined; fewer where the pixels join those of the first frame
        after = passage.after()
        pixels = after.frames * after.area * COLOURS * item
        return 2 * entering + 3 * pixels
    return entering + sum(_conv_bytes(layer, passage, form) for layer in block.layers.values())


def _resblock_bytes(block: ResBlockSpec, passage: Passage, form: MemoryFormat) -> int:
    """The worst of its steps; in bands, that of one band, beside the whole output and the next state."""
    shape = BandShape.of(block) if form.in_bands else None
    size = None if shape is None else shape.size(passage.frames, passage.rows, passage.columns, form.item_bytes)
    if shape is None or size is None:
        return _whole_resblock_bytes(block, passage, form)
    frames, rows = size
    band = replace(passage, frames=frames, rows=min(rows + 2 * shape.halo, passage.rows), frames_after=frames)
    past = sum((layer.kernel[0] - 1) * layer.in_width for layer in block.layers.values()) if form.keeps_state else 0
    kept = passage.area * (past + passage.frames * block.out_width)
    return form.item_bytes * (kept + _elements(band)) + _whole_resblock_bytes(block, band, form)


def _whole_resblock_bytes(block: ResBlockSpec, passage: Passage, form: MemoryFormat) -> int:
    positions = passage.frames * passage.area * form.item_bytes
    around = 0 if block.shortcut is None else _conv_bytes(block.shortcut, passage, form)
    around += 2 * positions * block.conv1.in_width * block.shortcut_norm  # normalised, and once more in another layout
    return max(
        _normed_conv_bytes(block.norm, block.conv1, passage, form),
        positions * block.conv2.in_width + _normed_conv_bytes(block.norm, block.conv2, passage, form),
        positions * block.out_width + around,
    )


def _chain_bytes(block: ChainSpec, passage: Passage, form: MemoryFormat) -> int:
    """Each layer beside its input, activated in place; then the sum with the shortcut."""
    positions = passage.frames * passage.area * form.item_bytes
    worst = 0
    for index, name in enumerate(block.path):
        layer = block.layers[name]
        worst = max(worst, (positions * layer.in_width if index else 0) + _conv_bytes(layer, passage, form))
    around = 0 if block.shortcut is None else _conv_bytes(block.shortcut, passage, form)
    return max(worst, positions * block.out_width + around)


def _naf_bytes(block: NafSpec | IstaSpec, passage: Passage, form: MemoryFormat) -> int:
    """The widest naf block: its mixed input and another tensor of that size, values and gates, and their product.

    A bottleneck meanwhile holds the block's input, the start of its step, and the shrunk tensor.
    """
    units = [block] if isinstance(block, NafSpec) else list(block.units.values())
    positions = passage.frames * passage.area * form.item_bytes
    held = 0 if isinstance(block, NafSpec) else 3 * positions * block.out_width
    worst = 0
    for unit in units:
        inner = max(branch.contract.in_width for branch in unit.branches)
        mixing = _conv_bytes(unit.depthwise, passage, form) + positions * unit.out_width
        gating = positions * (2 * unit.out_width + 4 * inner)
        if not form.has_kernels:
            gating += positions * (unit.out_width + 2 * inner)
        worst = max(worst, mixing, gating)
    return held + worst


def _upsample_bytes(passage: Passage, block: UpsampleSpec, form: MemoryFormat) -> int:
    item, after = form.item_bytes, passage.after()
    temporal, doubled = 0, 0
    if block.temporal is not None:
        out = passage.frames * passage.area * block.temporal.out_width * item
        doubled = after.frames * passage.area * block.spatial.in_width * item
        # interleaved, then joined to the first frame
        temporal = max(_conv_bytes(block.temporal, passage, form), out + doubled, 2 * doubled)
    elif block.repeats_frames:
        doubled = (after.frames + 1) * passage.area * block.spatial.in_width * item
    enlarged = 0 if block.spatial.enlarges else after.frames * after.area * block.spatial.in_width * item
    if after.frames == 2 * passage.frames - 1 and form.channels_last:
        # the first frame and the rest are joined to a contiguous tensor, which is laid out again
        enlarged += enlarged or doubled
    return max(temporal, doubled + enlarged + _conv_bytes(block.spatial, after, form))


def _shuffle_bytes(passage: Passage, block: ShuffleUpsampleSpec, form: MemoryFormat) -> int:
    """The layer, and its output reordered; with a residual also the reordered and repeated input, and the sum."""
    item = form.item_bytes
    moved = passage.after().frames * passage.after().area * block.out_width * item
    wide = passage.frames * passage.area * block.conv.out_width * item
    ordered = 2 * wide if form.channels_last else wide  # frames are dropped, then laid out again
    alone = max(_conv_bytes(block.conv, passage, form), wide + ordered)
    own = passage.frames * passage.area * block.conv.in_width * item
    return max(alone, 3 * moved + own) if block.residual else alone


def _cell_bytes(passage: Passage, block: CellUpsampleSpec, form: MemoryFormat) -> int:
    """The layer with the copies added in place, its output reordered, and joined to a first frame."""
    item, after = form.item_bytes, passage.after()
    wide = passage.frames * passage.area * block.conv.out_width * item
    joined = (
        after.frames * after.area * block.out_width * item if after.frames < block.factor[0] * passage.frames else 0
    )
    if form.channels_last:  # laid out again
        joined = 2 * joined or wide
    return max(_conv_bytes(block.conv, passage, form), 2 * wide + joined)


def _normed_conv_bytes(norm: NormSpec | None, layer: ConvSpec, passage: Passage, form: MemoryFormat) -> int:
    """Norm with SiLU in place (RMS norms in half precision: a frame at a time in float32), then the layer."""
    frame = passage.area * layer.in_width
    in_full_precision = 8 * frame if norm is not None and norm.groups is None and form.item_bytes < 4 else 0
    return passage.frames * frame * form.item_bytes + max(_conv_bytes(layer, passage, form), in_full_precision)


def _conv_bytes(layer: ConvSpec, passage: Passage, form: MemoryFormat) -> int:
    """Bytes that a layer needs beside its input: the input with its past, temporaries, output."""
    past = layer.kernel[0] - 1
    frame = passage.area * layer.in_width * form.item_bytes
    window = (passage.frames + past) * frame if past else 0
    if layer.space_padding == "zeros":
        return _reading_bytes(layer, passage, form, window)
    rows, columns = (
        side + taps - 1 for side, taps in zip((passage.rows, passage.columns), layer.kernel[1:], strict=True)
    )
    mirrored = (passage.frames + past) * rows * columns * layer.in_width * form.item_bytes
    return max(window + mirrored, _reading_bytes(layer, passage, form, mirrored))  # replaces the window


def _reading_bytes(layer: ConvSpec, passage: Passage, form: MemoryFormat, window: int) -> int:
    """The same for a layer that reads a window of so many bytes (0: its input itself), those included."""
    item, positions = form.item_bytes, passage.frames * passage.area
    leaving, entering = positions * layer.out_width * item, positions * layer.in_width * item
    reordered = 0 if form.channels_last else max(window, entering)
    if not form.has_kernels:
        return window + 2 * leaving + reordered + _patch_bytes(layer, passage, form)
    if layer.operator == "depthwise3d":
        return window + 2 * leaving + reordered
    if layer.operator == "dwsep3d":
        return max(window + entering + reordered, entering + leaving + window)
    if layer.rank is not None:
        hidden = positions * layer.rank * item
        return hidden + max(hidden, leaving) + reordered
    if layer.operator == "causal3d":
        return window + leaving + max(reordered, _unrolled_bytes(layer, passage, form))
    mirrored = window if layer.space_padding != "zeros" else 0
    if layer.operator == "stacked3d":
        return mirrored + 2 * layer.kernel[0] * positions * layer.out_width * 4 + reordered
    if layer.operator == "winograd3d" and item > 2 and _uses_winograd(layer, passage):
        return leaving + _winograd_bytes(layer, passage, form) + reordered
    if layer.plain_operator == "causal3d":  # a tap and the sum
        return (mirrored if layer.time_padding == "zeros" else window) + 2 * leaving + reordered
    return mirrored + (2 if layer.enlarges else 1) * leaving + reordered  # the phases, and the frames made of them


def _uses_winograd(layer: ConvSpec, passage: Passage) -> bool:
    """Whether it may: with a past its cost is another."""
    frames, num_taps = passage.frames, layer.kernel[0]
    num_tiles = ceil(passage.rows / 4) * ceil(passage.columns / 4)
    return any(
        is_worthwhile(
            layer.in_width,
            layer.out_width,
            num_taps,
            num_inputs=num_inputs,
            num_outputs=frames,
            num_tiles=num_tiles,
        )
        for num_inputs in (frames, frames + num_taps - 1)
    )


def _winograd_bytes(layer: ConvSpec, passage: Passage, form: MemoryFormat) -> int:
    kernel = 36 * layer.kernel[0] * layer.in_width * layer.out_width
    elements = max(  # fewer frames may be transformed at once instead of in strips
        working_elements(
            ceil(passage.rows / 4), num_frames * ceil(passage.columns / 4), layer.in_width, layer.out_width, kernel
        )
        for num_frames in (passage.frames, passage.frames + layer.kernel[0] - 1)
    )
    return elements * form.item_bytes


def _unrolled_bytes(layer: ConvSpec, passage: Passage, form: MemoryFormat) -> int:
    """Patches of torch's fallback on the CPU, for full precision only: float64, few elements, kernels of 1x1 in space.

    Reference: `use_mkldnn` in torch's aten/src/ATen/native/Convolution.cpp.
    """
    kt, kh, kw = layer.kernel
    window = (passage.frames + kt - 1) * layer.in_width
    small = window * passage.rows <= UNROLLED_BELOW
    if form.item_bytes < 4 or not (small or kh == kw == 1 or form.dtype == "float64"):
        return 0
    return _patch_bytes(layer, passage, form)


def _patch_bytes(layer: ConvSpec, passage: Passage, form: MemoryFormat) -> int:
    """The patches that a kernel reads, written out, and the input reordered for them."""
    window = (passage.frames + layer.kernel[0] - 1) * layer.in_width
    patches = prod(layer.kernel) * layer.in_width * passage.frames
    return (patches + window) * passage.area * form.item_bytes
