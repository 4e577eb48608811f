"""The architecture of an encoder or decoder as data.

A spec lists every layer with its operator and widths. Pruned and converted decoders are the same
code built from another spec, so a spec is all that an artifact needs beside its weights.
Imports no torch: recipes, tables and the command line read specs without paying for it.

Reference: Wan 2.1 VAE; arXiv 2602.19161, section 3.2 for the operator set.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flashvaed_cli.errors import SpecError

Operator = Literal[
    "causal3d",
    "dwsep3d",
    "frame2d",
    "pointwise",
    "tapwise3d",
    "stacked3d",
    "winograd3d",
    "subpixel2d",
]
Kernel = tuple[int, int, int]
Factor = tuple[int, int, int]
"""Frames, rows and columns that one position becomes, or that become one."""
SpacePadding = Literal["zeros", "reflect"]
"""What a kernel reads beyond a frame: zeros, or the frame mirrored at its outermost pixels."""
TimePadding = Literal["zeros", "first", "edges"]
"""What a kernel reads beyond a video: zeros before it, its first frame again, or (centred) both edge frames again."""

PLAIN_OPERATORS: dict[Operator, Operator] = {
    "tapwise3d": "causal3d",
    "stacked3d": "causal3d",
    "winograd3d": "causal3d",
    "subpixel2d": "frame2d",
}
"""Exact twin to the plain operator whose parameters and outputs it has."""


_ONLY_3X3: frozenset[Operator] = frozenset({"winograd3d", "subpixel2d"})


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NormSpec(_Frozen):
    """Each position divided by its root mean square over the channels, then what is learned.

    Attributes:
        eps: added to the mean square; None: the norm of the vector is held above 1e-12 instead.
        gain: a factor per channel, `gamma`.
        shift: a summand per channel, `beta`.
    """

    eps: float | None = None
    gain: bool = True
    shift: bool = False


class ConvSpec(_Frozen):
    """One convolution: `[B, in_width, T, H, W]` to `[B, out_width, T, H, W]`, with bias.

    Operators:
        causal3d: dense kernel `(kt, kh, kw)`, causal in time (zeros before the first frame).
        dwsep3d: depthwise causal `(kt, kh, kw)`, then pointwise.
        frame2d: dense `(1, kh, kw)` on every frame by itself.
        pointwise: `(1, 1, 1)`.
    Exact twins (the same parameters and, up to rounding, the same outputs as the operator in brackets):
        tapwise3d [causal3d]: a sum over temporal taps of 2D convolutions; no window, no products with zeros.
        stacked3d [causal3d]: one 2D convolution to `kt` times as many channels, added up over time: few outputs.
        winograd3d [causal3d]: `(kt, 3, 3)` by minimal filtering, a quarter of the products; half precision: tapwise3d.
        subpixel2d [frame2d]: an upsampler's `spatial` (3x3) only: the nearest upsampling before it is folded into
            four 2x2 kernels on the small frames.

    `time_padding`: `zeros` and `first` are causal, `edges` sees as many frames ahead as behind. A layer with one
    temporal tap has none to choose.
    """

    operator: Operator
    in_width: int = Field(gt=0)
    out_width: int = Field(gt=0)
    kernel: Kernel
    time_padding: TimePadding = "zeros"
    space_padding: SpacePadding = "zeros"

    @model_validator(mode="after")
    def _kernel_fits_operator(self) -> ConvSpec:
        if self.operator == "pointwise" and self.kernel != (1, 1, 1):
            raise ValueError(f"a pointwise layer has kernel (1, 1, 1), not {self.kernel}")
        if self.plain_operator == "frame2d" and self.kernel[0] != 1:
            raise ValueError(f"a {self.operator} layer has one temporal tap, not kernel {self.kernel}")
        if self.operator in _ONLY_3X3 and self.kernel[1:] != (3, 3):
            raise ValueError(f"a {self.operator} layer has 3x3 taps in space, not kernel {self.kernel}")
        if self.time_padding != "zeros" and self.kernel[0] == 1:
            raise ValueError(f"a layer with one temporal tap pads nothing in time, not {self.time_padding}")
        if self.operator == "stacked3d" and self.time_padding != "zeros":
            raise ValueError(f"a stacked3d layer pads zeros in time, not {self.time_padding}")
        if self.operator in PLAIN_OPERATORS and self.space_padding != "zeros":
            raise ValueError(f"a {self.operator} layer pads zeros around frames, not {self.space_padding}")
        if self.time_padding == "edges" and self.kernel[0] % 2 == 0:
            raise ValueError(f"a centred kernel has an odd number of temporal taps, not {self.kernel[0]}")
        return self

    @property
    def num_past(self) -> int:
        """Frames before a position that the layer reads for it."""
        return self.kernel[0] - 1 - self.num_ahead

    @property
    def num_ahead(self) -> int:
        """Frames behind a position that the layer reads for it: none where it is causal."""
        return self.kernel[0] // 2 if self.time_padding == "edges" else 0

    @property
    def plain_operator(self) -> Operator:
        """The operator itself, or the one that it is an exact twin of."""
        return PLAIN_OPERATORS.get(self.operator, self.operator)

    @property
    def enlarges(self) -> bool:
        """Whether the layer doubles the size of the frames, as only an upsampler's `spatial` may."""
        return self.operator == "subpixel2d"

    @property
    def parameter_count(self) -> int:
        """Weights and bias."""
        kt, kh, kw = self.kernel
        if self.operator == "dwsep3d":
            return self.in_width * kt * kh * kw + self.in_width * self.out_width + self.out_width
        return self.in_width * self.out_width * kt * kh * kw + self.out_width


class ConvBlockSpec(_Frozen):
    """A single convolution as a block (conv_in, the 1x1 around the latent)."""

    kind: Literal["conv"] = "conv"
    conv: ConvSpec


class ResBlockSpec(_Frozen):
    """norm1, SiLU, conv1, norm2, SiLU, conv2, plus the shortcut (identity if None).

    Attributes:
        norm: both norms of the main path.
        shortcut_norm: a layer norm over the channels, with gain and shift, stands before the shortcut.
        noise: behind both convolutions there are learned scales for noise; see `decoders.noise`.
    """

    kind: Literal["resblock"] = "resblock"
    conv1: ConvSpec
    conv2: ConvSpec
    shortcut: ConvSpec | None = None
    norm: NormSpec = NormSpec()
    shortcut_norm: bool = False
    noise: bool = False

    @model_validator(mode="after")
    def _widths_chain(self) -> ResBlockSpec:
        if self.conv1.out_width != self.conv2.in_width:
            raise ValueError(f"conv1 gives {self.conv1.out_width} channels, conv2 takes {self.conv2.in_width}")
        if self.shortcut is None and self.conv1.in_width != self.conv2.out_width:
            raise ValueError(
                f"an identity shortcut cannot join {self.conv1.in_width} channels to {self.conv2.out_width}"
            )
        if self.shortcut_norm and self.shortcut is None:
            raise ValueError("a norm before the shortcut needs a shortcut that is no identity")
        return self


class AttentionSpec(_Frozen):
    """Single-head self-attention over the positions of each frame, residual. `inner_width` is that of q, k and v."""

    kind: Literal["attention"] = "attention"
    width: int = Field(gt=0)
    inner_width: int = Field(gt=0)


class UpsampleSpec(_Frozen):
    """Optional doubling in time, then nearest x2 in space and `spatial`.

    `temporal` gives 2 x width channels, which become two frames each: 1 + 2 (T - 1) frames.
    """

    kind: Literal["upsample"] = "upsample"
    temporal: ConvSpec | None = None
    spatial: ConvSpec


class DownsampleSpec(_Frozen):
    """`spatial` with stride 2 (padded right and below), then optional `temporal` with stride 2 (first frame passes)."""

    kind: Literal["downsample"] = "downsample"
    spatial: ConvSpec
    temporal: ConvSpec | None = None


class ShuffleUpsampleSpec(_Frozen):
    """`conv`, whose channels then move into time and space: 1 + ft (T - 1) frames, fh and fw times the size.

    Channel c of the output is channels c * ft * fh * fw and following of `conv`, in the order of `factor`; the first
    ft - 1 frames of a video are dropped. With `residual` the input, moved in the same way and its channels
    repeated as often as needed, is added.
    """

    kind: Literal["shuffle_upsample"] = "shuffle_upsample"
    conv: ConvSpec
    factor: Factor = (2, 2, 2)
    residual: bool = False

    @model_validator(mode="after")
    def _widths_divide(self) -> ShuffleUpsampleSpec:
        cell = _cell(self.factor)
        if self.conv.out_width % cell:
            raise ValueError(f"{self.conv.out_width} channels do not make cells of {cell}")
        if self.residual and (self.conv.in_width % cell or self.conv.out_width % self.conv.in_width):
            raise ValueError(f"a residual cannot join {self.conv.in_width} channels to {self.conv.out_width // cell}")
        return self

    @property
    def cell(self) -> int:
        """Positions that one becomes: channels of `conv` per channel of the output."""
        return _cell(self.factor)


class StridedDownsampleSpec(_Frozen):
    """`conv` at every second frame (from the first), row and column: 1 + (T - 1) / 2 frames. Zeros all around."""

    kind: Literal["strided_downsample"] = "strided_downsample"
    conv: ConvSpec
    factor: Factor = (2, 2, 2)


class UnshuffleDownsampleSpec(_Frozen):
    """`conv`, then cells of `factor` positions move into the channels; plus the input's cells, averaged to as many.

    The first frame of a video stands there ft times, which gives 1 + (T - 1) / ft frames.
    """

    kind: Literal["unshuffle_downsample"] = "unshuffle_downsample"
    conv: ConvSpec
    factor: Factor

    @model_validator(mode="after")
    def _widths_divide(self) -> UnshuffleDownsampleSpec:
        if self.conv.in_width % self.conv.out_width:
            raise ValueError(f"cells of {self.conv.in_width} channels cannot be averaged to {self.conv.out_width}")
        return self

    @property
    def cell(self) -> int:
        """Positions that become one: channels of the output per channel of `conv`."""
        return _cell(self.factor)


def _cell(factor: Factor) -> int:
    return factor[0] * factor[1] * factor[2]


class HeadSpec(_Frozen):
    """norm, SiLU, conv."""

    kind: Literal["head"] = "head"
    conv: ConvSpec
    norm: NormSpec = NormSpec()


BlockSpec = Annotated[
    ConvBlockSpec
    | ResBlockSpec
    | AttentionSpec
    | UpsampleSpec
    | ShuffleUpsampleSpec
    | DownsampleSpec
    | StridedDownsampleSpec
    | UnshuffleDownsampleSpec
    | HeadSpec,
    Field(discriminator="kind"),
]


def block_in_width(block: BlockSpec) -> int:
    """Width of the tensor that enters a block."""
    if isinstance(block, ResBlockSpec):
        return block.conv1.in_width
    if isinstance(block, AttentionSpec):
        return block.width
    if isinstance(block, UpsampleSpec | DownsampleSpec):
        return block.spatial.in_width
    return block.conv.in_width


def block_out_width(block: BlockSpec) -> int:
    """Width of the tensor that leaves a block."""
    if isinstance(block, ResBlockSpec):
        return block.conv2.out_width
    if isinstance(block, AttentionSpec):
        return block.width
    if isinstance(block, UpsampleSpec | DownsampleSpec):
        return block.spatial.out_width
    if isinstance(block, ShuffleUpsampleSpec):
        return block.conv.out_width // block.cell
    if isinstance(block, UnshuffleDownsampleSpec):
        return block.conv.out_width * block.cell
    return block.conv.out_width


def block_growth(block: BlockSpec) -> Factor:
    """Frames (all but the first of the video), rows and columns that a block of a decoder makes of each."""
    if isinstance(block, UpsampleSpec):
        return (1 if block.temporal is None else 2, 2, 2)
    return block.factor if isinstance(block, ShuffleUpsampleSpec) else (1, 1, 1)


def block_shrinkage(block: BlockSpec) -> Factor:
    """Frames (all but the first of the video), rows and columns that a block of an encoder makes one."""
    if isinstance(block, DownsampleSpec):
        return (1 if block.temporal is None else 2, 2, 2)
    return block.factor if isinstance(block, StridedDownsampleSpec | UnshuffleDownsampleSpec) else (1, 1, 1)


def block_layers(block: BlockSpec) -> dict[str, ConvSpec]:
    """The convolutions of a block by attribute name, in forward order (attention projections excepted)."""
    if isinstance(block, AttentionSpec):
        return {}
    fields = ("conv1", "conv2", "shortcut", "temporal", "spatial", "conv")
    if isinstance(block, DownsampleSpec):
        fields = ("spatial", "temporal")
    return {name: layer for name in fields if isinstance(layer := getattr(block, name, None), ConvSpec)}


class BypassSpec(_Frozen):
    """What enters a stage, brought to the grid that leaves it and added there, past all blocks of the stage.

    One position of the coarser grid is a *cell* of `temporal_factor` x `spatial_factor` x `spatial_factor` positions
    of the finer one; wide channel c * cell_size + s is channel c at position s of the cell.

    Kinds:
        duplicate (up): wide channel w of the output is channel w // n of the input, n = out_width * cell_size /
            in_width. Or `conv` gives the wide channels: what is left of the copies when either end was pruned.
        average (down): output channel c is the mean of the n wide channels from c * n on, n = in_width * cell_size /
            out_width.
    The first frame of a video is the last of its cell.
    """

    kind: Literal["duplicate", "average"]
    in_width: int = Field(gt=0)
    out_width: int = Field(gt=0)
    temporal_factor: Literal[1, 2] = 1
    spatial_factor: Literal[1, 2] = 1
    conv: ConvSpec | None = None

    @model_validator(mode="after")
    def _widths_fit(self) -> BypassSpec:
        ends = self.in_width, self.out_width
        many, few = (self.out_width, self.in_width) if self.kind == "duplicate" else (self.in_width, self.out_width)
        if self.conv is None and many * self.cell_size % few:
            raise ValueError(f"a bypass with cells of {self.cell_size} cannot join {ends[0]} channels to {ends[1]}")
        if self.conv is not None and (self.kind != "duplicate" or self.conv != _bypass_conv(*ends, self.cell_size)):
            raise ValueError(f"the layer of a bypass is pointwise, {ends[0]} to {ends[1] * self.cell_size} channels")
        return self

    @property
    def cell_size(self) -> int:
        """Positions of the finer grid per position of the coarser one."""
        return self.temporal_factor * self.spatial_factor**2

    def narrowed(self, in_width: int, out_width: int) -> BypassSpec:
        """The same between other widths, with a layer for the copies."""
        conv = _bypass_conv(in_width, out_width, self.cell_size)
        return self.model_copy(update={"in_width": in_width, "out_width": out_width, "conv": conv})


def _bypass_conv(in_width: int, out_width: int, cell_size: int) -> ConvSpec:
    return ConvSpec(operator="pointwise", in_width=in_width, out_width=out_width * cell_size, kernel=(1, 1, 1))


class StageSpec(_Frozen):
    """A named run of blocks at one resolution, with the resampler that leaves it; `bypass` leads past all of them."""

    name: str
    blocks: tuple[BlockSpec, ...]
    bypass: BypassSpec | None = None

    @model_validator(mode="after")
    def _bypass_fits_blocks(self) -> StageSpec:
        if self.bypass is None:
            return self
        ends = block_in_width(self.blocks[0]), block_out_width(self.blocks[-1])
        if ends != (self.bypass.in_width, self.bypass.out_width):
            raise ValueError(
                f"the bypass of {self.name} joins {self.bypass.in_width} channels to {self.bypass.out_width}, "
                f"its blocks {ends[0]} to {ends[1]}"
            )
        return self


class CoderSpec(_Frozen):
    """A whole encoder or decoder: stages in forward order, each a run of blocks.

    `temporal_factor` and `spatial_factor` are pixels per latent: frames = 1 + temporal_factor * (T - 1).
    The blocks see `patch` x `patch` pixels of a frame as channels of one position; `spatial_factor` counts pixels.
    `still`: no layer works in time, and the decoder is for single images (T = 1), whatever the `temporal_factor` of the
    latents' family.
    """

    family: str
    role: Literal["encoder", "decoder"]
    stages: tuple[StageSpec, ...]
    temporal_factor: int
    spatial_factor: int
    patch: int = Field(default=1, gt=0)
    still: bool = False

    @model_validator(mode="after")
    def _widths_chain(self) -> CoderSpec:
        previous: tuple[str, int] | None = None
        for address, block in self.blocks():
            if previous is not None and previous[1] != block_in_width(block):
                raise ValueError(f"{previous[0]} gives {previous[1]} channels, {address} takes {block_in_width(block)}")
            previous = (address, block_out_width(block))
        return self

    @model_validator(mode="after")
    def _still_has_no_time(self) -> CoderSpec:
        for address, layer in self.layers() if self.still else ():
            if layer.kernel[0] > 1 or address.endswith(".temporal"):
                raise ValueError(f"{address} works in time, which a decoder of single images does not")
        return self

    @model_validator(mode="after")
    def _only_upsamplers_enlarge(self) -> CoderSpec:
        for address, block in self.blocks():
            for name, layer in block_layers(block).items():
                if layer.enlarges and not (isinstance(block, UpsampleSpec) and name == "spatial"):
                    raise ValueError(f"{address}.{name} cannot be {layer.operator}: only an upsampler's spatial layer")
        return self

    def num_latents(self, num_frames: int) -> int:
        """Latent frames that hold so many frames of a video; always one for single images."""
        return 1 if self.still else 1 + -(-(num_frames - 1) // self.temporal_factor)

    def require_length(self, num_latents: int) -> None:
        """Raise SpecError unless so many latent frames can be decoded at once: single images come one by one."""
        if self.still and num_latents != 1:
            raise SpecError(
                f"a decoder of single images takes 1 latent frame, got {num_latents}: give each image as a clip of "
                "its own (several as a batch), or decode videos with the decoder that it was made from"
            )

    def blocks(self) -> Iterator[tuple[str, BlockSpec]]:
        """Every block with its address `stage.index`, in forward order."""
        for stage in self.stages:
            for index, block in enumerate(stage.blocks):
                yield f"{stage.name}.{index}", block

    def layers(self) -> Iterator[tuple[str, ConvSpec]]:
        """Every convolution with its address `stage.index.name`, in forward order.

        That of a bypass is `stage.index.bypass`, with the stage's last block, whose output it is added to.
        """
        ending = {address: stage.bypass.conv for address, stage in self.bypassed().items() if stage.bypass}
        for address, block in self.blocks():
            for name, layer in block_layers(block).items():
                yield f"{address}.{name}", layer
            if (conv := ending.get(address)) is not None:
                yield f"{address}.bypass", conv

    def bypassed(self) -> dict[str, StageSpec]:
        """The stages that have a bypass, by the address of their last block."""
        return {f"{stage.name}.{len(stage.blocks) - 1}": stage for stage in self.stages if stage.bypass is not None}

    @property
    def is_causal(self) -> bool:
        """Whether no layer sees frames ahead, so that chunks follow each other by a state alone."""
        return all(layer.num_ahead == 0 for _, layer in self.layers())

    def stage(self, name: str) -> StageSpec:
        """The stage of that name. Raises KeyError."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    def with_blocks(self, changed: dict[str, BlockSpec]) -> CoderSpec:
        """A copy with the blocks at the given addresses replaced; a bypass follows the widths. Checked as a whole."""
        stages: list[StageSpec] = []
        for stage in self.stages:
            blocks = tuple(changed.get(f"{stage.name}.{i}", block) for i, block in enumerate(stage.blocks))
            ends, bypass = (block_in_width(blocks[0]), block_out_width(blocks[-1])), stage.bypass
            if bypass is not None and ends != (bypass.in_width, bypass.out_width):
                bypass = bypass.narrowed(*ends)
            stages.append(StageSpec(name=stage.name, blocks=blocks, bypass=bypass))
        return type(self)(**{**dict(self), "stages": tuple(stages)})


class DecoderSpec(CoderSpec):
    """A decoder: latents `[B, C, T, Hz, Wz]`, raw scale, to pixels `[B, 3, F, H, W]` in [-1, 1].

    `decode_timestep`: of a decoder that was conditioned on the timestep (the share of noise in the latents), the one
    that its norms now stand for; None: there was no such condition.
    """

    role: Literal["decoder"] = "decoder"
    decode_timestep: float | None = None

    def with_blocks(self, changed: dict[str, BlockSpec]) -> DecoderSpec:
        """A copy with the blocks at the given addresses replaced; checked as a whole."""
        return DecoderSpec(**dict(super().with_blocks(changed)))

    @property
    def latent_width(self) -> int:
        """Number of latent channels."""
        return block_in_width(self.stages[0].blocks[0])


class EncoderSpec(CoderSpec):
    """An encoder: pixels to latent mean and log-variance, concatenated on the channel axis.

    `shared_variance`: one channel of log-variance for all latent channels, instead of one for each.
    """

    role: Literal["encoder"] = "encoder"
    shared_variance: bool = False

    @property
    def latent_width(self) -> int:
        """Number of latent channels."""
        out_width = block_out_width(self.stages[-1].blocks[-1])
        return out_width - 1 if self.shared_variance else out_width // 2
