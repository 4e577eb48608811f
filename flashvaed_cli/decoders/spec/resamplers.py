"""The blocks that change the grid, as data: upsamplers and downsamplers, by kernels or by moving cells.

Imports no torch. Reference: Wan 2.1 VAE, LTX-Video, HunyuanVideo 1.5 (after DC-AE, arXiv 2410.10733).
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import model_validator

from flashvaed_cli.decoders.spec.block import Block, Grid, Reader
from flashvaed_cli.decoders.spec.convolutions import point_conv
from flashvaed_cli.decoders.spec.layers import ConvSpec, Factor

_NUM_TAPS = 9
"""Of a `subpixel2d` layer, in space."""


class UpsampleSpec(Block):
    """Optional doubling in time, then nearest x2 in space and `spatial`.

    `temporal` gives 2 x width channels, which become two frames each: 1 + 2 (T - 1) frames. With `grows_first` the
    first frame of a video is doubled too: 2 T frames, of which the head drops the surplus ones at the beginning.
    `repeats_frames`: instead of `temporal`, every frame but the first of a video is repeated: 1 + 2 (T - 1) frames.
    """

    omitted_defaults: ClassVar[tuple[str, ...]] = ("grows_first", "repeats_frames")

    has_still_form: ClassVar[bool] = True

    kind: Literal["upsample"] = "upsample"
    temporal: ConvSpec | None = None
    spatial: ConvSpec
    grows_first: bool = False
    repeats_frames: bool = False

    @model_validator(mode="after")
    def _grows(self) -> UpsampleSpec:
        if self.repeats_frames and self.temporal is not None:
            raise ValueError("an upsampler doubles frames by a temporal layer or by repeating them, not by both")
        if self.grows_first and self.temporal is None:
            raise ValueError("an upsampler without a temporal layer doubles no frame, so not the first either")
        return self

    @property
    def in_width(self) -> int:
        """`temporal` keeps the width."""
        return self.spatial.in_width

    @property
    def widest_output(self) -> int:
        """`temporal` runs before the frames grow."""
        return self.spatial.out_width

    @property
    def growth(self) -> Factor:
        """Twice the size; twice the frames with `temporal` or `repeats_frames`."""
        return (1 if self.temporal is None and not self.repeats_frames else 2, 2, 2)

    @property
    def enlarges_first(self) -> bool:
        """Unless `spatial` enlarges frames itself."""
        return not self.spatial.enlarges

    @property
    def is_folded(self) -> bool:
        """Whether both layers run as one kernel: with exact operators, where few channels leave."""
        temporal, spatial = self.temporal, self.spatial
        if temporal is None or temporal.operator != "tapwise3d" or temporal.kernel[1:] != (1, 1):
            return False
        causal = temporal.time_padding == "zeros"
        return causal and spatial.operator == "subpixel2d" and _NUM_TAPS * spatial.out_width < spatial.in_width

    @property
    def readers(self) -> tuple[Reader, ...]:
        """`temporal` keeps the channels of its input, so `spatial` reads them too."""
        return tuple(Reader(layer=name) for name in self.layers)

    @property
    def ends_stream(self) -> bool:
        """Its output belongs to the next stage, of another size."""
        return True

    def grid_after(self, grid: Grid) -> Grid:
        """The first frame of a video is doubled only with `grows_first`."""
        frames, height, width = super().grid_after(grid)
        return (2 * grid[0] if self.grows_first else frames, height, width)

    def layer_grid(self, name: str, grid: Grid) -> Grid:
        """`temporal` runs on small frames; the first frame of a video skips it unless it is doubled too."""
        if name != "temporal":
            return self.grid_after(grid)
        return grid if self.grows_first else (grid[0] - 1, *grid[1:])

    def computed_layer(self, name: str, grid: Grid) -> tuple[ConvSpec, Grid]:
        """As one kernel, the taps of `spatial` on both frames that `temporal` makes, or on the one that skips it."""
        layer, at = super().computed_layer(name, grid)
        if not self.is_folded:
            return layer, at
        width = _NUM_TAPS * self.spatial.out_width
        if name == "temporal":
            return layer.model_copy(update={"out_width": 2 * width}), at
        single = ConvSpec(operator="pointwise", in_width=layer.in_width, out_width=width, kernel=(1, 1, 1))
        return single, (0 if self.grows_first else 1, *grid[1:])


class DownsampleSpec(Block):
    """`spatial` with stride 2, padded right and below; then optional `temporal` with stride 2 (first frame passes)."""

    kind: Literal["downsample"] = "downsample"
    spatial: ConvSpec
    temporal: ConvSpec | None = None

    @property
    def out_width(self) -> int:
        """`temporal` keeps the width."""
        return self.spatial.out_width

    @property
    def shrinkage(self) -> Factor:
        """Half the size; half the frames with `temporal`."""
        return (1 if self.temporal is None else 2, 2, 2)

    @property
    def ends_stream(self) -> bool:
        """Its output belongs to the next stage, of another size."""
        return True

    def layer_grid(self, name: str, grid: Grid) -> Grid:
        """`spatial` runs on all frames, `temporal` on small ones."""
        after = self.grid_after(grid)
        return (after[0] - 1, *after[1:]) if name == "temporal" else (grid[0], *after[1:])


class StridedDownsampleSpec(Block):
    """`conv` with the stride `factor`, from the first frame on: 1 + (T - 1) / ft frames.

    `pads_after`: around frames, zeros are right and below only.
    """

    omitted_defaults: ClassVar[tuple[str, ...]] = ("pads_after",)

    kind: Literal["strided_downsample"] = "strided_downsample"
    conv: ConvSpec
    factor: Factor = (2, 2, 2)
    pads_after: bool = False

    @model_validator(mode="after")
    def _padding_fits(self) -> StridedDownsampleSpec:
        if self.pads_after and (self.conv.kernel[1:] != (3, 3) or self.conv.space_padding != "zeros"):
            raise ValueError("only kernels of 3x3 that pad zeros can have them right and below only")
        return self

    @property
    def shrinkage(self) -> Factor:
        """The stride."""
        return self.factor


class _CellBlock(Block):
    """What blocks share that move cells of ft x fh x fw positions between channels and the grid, beside one layer."""

    kind: str
    conv: ConvSpec
    factor: Factor

    @property
    def cell(self) -> int:
        """Positions of a cell: channels of its deep side for each of its wide side."""
        return math.prod(self.factor)


class _CellGrowthSpec(_CellBlock):
    """A layer whose channels then become positions, perhaps with copies of the input."""

    factor: Factor = (2, 2, 2)
    residual: bool

    @property
    def out_width(self) -> int:
        """The channels of a cell have become positions."""
        return self.conv.out_width // self.cell

    @property
    def widest_output(self) -> int:
        """The layers run before the frames grow."""
        return self.out_width

    @property
    def growth(self) -> Factor:
        """That of a cell."""
        return self.factor

    @property
    def carries_input(self) -> bool:
        """If it has a residual, which adds copies of it."""
        return self.residual

    @property
    def ends_stream(self) -> bool:
        """Its output belongs to the next stage, of another size."""
        return True

    def layer_grid(self, name: str, grid: Grid) -> Grid:
        """The layers run before the frames grow."""
        return grid


class _CellShrinkageSpec(_CellBlock):
    """`conv`, then the positions of a cell become channels; plus the input's cells, averaged to as many."""

    @property
    def out_width(self) -> int:
        """The positions of a cell have become channels."""
        return self.conv.out_width * self.cell

    @property
    def shrinkage(self) -> Factor:
        """That of a cell."""
        return self.factor

    def layer_grid(self, name: str, grid: Grid) -> Grid:
        """`conv` runs before the frames shrink."""
        return grid


class ShuffleUpsampleSpec(_CellGrowthSpec):
    """`conv`, whose channels then move into time and space: 1 + ft (T - 1) frames, fh and fw times the size.

    Channel c of the output comes from the channels of `conv` from c * ft * fh * fw on, in the order of `factor`; of the
    first ft frames of a video one is kept, the last or the first. With `residual` the input is added, moved in the same
    way and its channels repeated as often as needed.
    """

    omitted_defaults: ClassVar[tuple[str, ...]] = ("keeps",)

    kind: Literal["shuffle_upsample"] = "shuffle_upsample"
    residual: bool = False
    keeps: Literal["last", "first"] = "last"

    @model_validator(mode="after")
    def _widths_divide(self) -> ShuffleUpsampleSpec:
        cell = self.cell
        if self.conv.out_width % cell:
            raise ValueError(f"{self.conv.out_width} channels do not make cells of {cell}")
        if self.residual and (self.conv.in_width % cell or self.conv.out_width % self.conv.in_width):
            raise ValueError(f"a residual cannot join {self.conv.in_width} channels to {self.conv.out_width // cell}")
        return self


class CellUpsampleSpec(_CellGrowthSpec):
    """`conv` and copies of the input, whose channels then move into time and space; a first frame has its own cell.

    Channel c of the output comes from the channels of `conv` from c * ft * fh * fw on, in the order of `factor`. The
    first frame of a video becomes one frame: a cell of fh x fw positions, whose position s takes the channel at ft * s.
    So 1 + ft (T - 1) frames come out.

    Attributes:
        residual: the input is added. Its channels are cut into equal runs, one for each position of a cell, and each
            channel is repeated in place as often as needed: ft * fh * fw runs, in a video's first frame fh * fw.
        first: added to a video's first frame, where pruning has made the residual part of `conv`: the two residuals
            differ.
    """

    omitted_defaults: ClassVar[tuple[str, ...]] = ("first",)

    has_still_form: ClassVar[bool] = True

    kind: Literal["cell_upsample"] = "cell_upsample"
    residual: bool = True
    first: ConvSpec | None = None

    @model_validator(mode="after")
    def _widths_divide(self) -> CellUpsampleSpec:
        conv, cell, ft = self.conv, self.cell, self.factor[0]
        if conv.out_width % cell:
            raise ValueError(f"{conv.out_width} channels do not make cells of {cell}")
        if self.residual and (conv.in_width % cell or conv.out_width // ft % conv.in_width):
            raise ValueError(f"a residual cannot join {conv.in_width} channels to {conv.out_width // cell}")
        if self.first is not None and (self.residual or ft == 1):
            raise ValueError("only where frames grow in time without a residual do first frames have their own layer")
        ends = conv.in_width, conv.out_width // ft
        if self.first is not None and self.first != point_conv(*ends):
            raise ValueError(f"the layer of first frames is pointwise, {ends[0]} to {ends[1]} channels")
        return self

    @property
    def first_cell(self) -> int:
        """Positions made of one in the first frame of a video."""
        return self.factor[1] * self.factor[2]

    @property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        """Its layers read the same."""
        return tuple((name,) for name in self.layers)

    @property
    def writers(self) -> tuple[str, ...]:
        """Both layers."""
        return tuple(self.layers)

    @property
    def readers(self) -> tuple[Reader, ...]:
        """Both layers."""
        return tuple(Reader(layer=name) for name in self.layers)

    def layer_grid(self, name: str, grid: Grid) -> Grid:
        """The layers run before the frames grow, `first` on one frame."""
        return (1, *grid[1:]) if name == "first" else grid


class UnshuffleDownsampleSpec(_CellShrinkageSpec):
    """`conv`, then cells of `factor` positions move into the channels; plus the input's cells, averaged to as many.

    The first frame of a video is taken ft times, which gives 1 + (T - 1) / ft frames.
    """

    kind: Literal["unshuffle_downsample"] = "unshuffle_downsample"

    @model_validator(mode="after")
    def _widths_divide(self) -> UnshuffleDownsampleSpec:
        if self.conv.in_width % self.conv.out_width:
            raise ValueError(f"cells of {self.conv.in_width} channels cannot be averaged to {self.conv.out_width}")
        return self


class CellDownsampleSpec(_CellShrinkageSpec):
    """`conv`, then cells of `factor` positions move into the channels; plus the input's cells, averaged to as many.

    All channels of one position come before those of the next, and runs of neighbours are averaged. The first frame of
    a video is a cell of fh x fw positions; its channels are taken ft times. So 1 + (T - 1) / ft frames come out.
    """

    kind: Literal["cell_downsample"] = "cell_downsample"

    @model_validator(mode="after")
    def _widths_divide(self) -> CellDownsampleSpec:
        if self.factor[1] * self.factor[2] * self.conv.in_width % self.out_width:
            raise ValueError(f"cells of {self.conv.in_width} channels cannot be averaged to {self.out_width}")
        return self
