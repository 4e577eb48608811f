"""The architecture of an encoder or decoder as data.

A spec lists every layer with its operator and widths. Pruned and converted decoders are the same
code built from another spec, so a spec is all that an artifact needs beside its weights.
Imports no torch: recipes, tables and the command line read specs without paying for it.

Reference: Wan 2.1 VAE; arXiv 2602.19161, section 3.2 for the operator set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    model_serializer,
    model_validator,
)

Operator = Literal[
    "causal3d",
    "dwsep3d",
    "frame2d",
    "pointwise",
    "lowrank3d",
    "tapwise3d",
    "stacked3d",
    "winograd3d",
    "subpixel2d",
]
Kernel = tuple[int, int, int]

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


class ConvSpec(_Frozen):
    """One convolution: `[B, in_width, T, H, W]` to `[B, out_width, T, H, W]`, with bias.

    Operators:
        causal3d: dense kernel `(kt, kh, kw)`, causal in time (zeros before the first frame).
        dwsep3d: depthwise causal `(kt, kh, kw)`, then pointwise.
        frame2d: dense `(1, kh, kw)` on every frame by itself.
        pointwise: `(1, 1, 1)`.
        lowrank3d: causal `(kt, 1, 1)` to `rank` channels, then pointwise.
    Exact twins (the same parameters and, up to rounding, the same outputs as the operator in brackets):
        tapwise3d [causal3d]: a sum over temporal taps of 2D convolutions; no window, no products with zeros.
        stacked3d [causal3d]: one 2D convolution to `kt` times as many channels, added up over time: few outputs.
        winograd3d [causal3d]: `(kt, 3, 3)` by minimal filtering, a quarter of the products; half precision: tapwise3d.
        subpixel2d [frame2d]: an upsampler's `spatial` (3x3) only: the nearest upsampling before it is folded into
            four 2x2 kernels on the small frames.
    """

    operator: Operator
    in_width: int = Field(gt=0)
    out_width: int = Field(gt=0)
    kernel: Kernel
    rank: int | None = Field(default=None, gt=0)

    @model_serializer(mode="wrap")
    def _without_absent_rank(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Artifacts without low-rank layers stay readable for versions that do not know them."""
        fields = handler(self)
        return fields if self.rank is not None else {name: fields[name] for name in fields if name != "rank"}

    @model_validator(mode="after")
    def _kernel_fits_operator(self) -> ConvSpec:
        if self.operator == "pointwise" and self.kernel != (1, 1, 1):
            raise ValueError(f"a pointwise layer has kernel (1, 1, 1), not {self.kernel}")
        if self.plain_operator == "frame2d" and self.kernel[0] != 1:
            raise ValueError(f"a {self.operator} layer has one temporal tap, not kernel {self.kernel}")
        if self.operator in _ONLY_3X3 and self.kernel[1:] != (3, 3):
            raise ValueError(f"a {self.operator} layer has 3x3 taps in space, not kernel {self.kernel}")
        if (self.operator == "lowrank3d") != (self.rank is not None):
            raise ValueError(f"rank {self.rank} in a {self.operator} layer: lowrank3d has one, no other operator has")
        if self.operator == "lowrank3d" and self.kernel[1:] != (1, 1):
            raise ValueError(f"a lowrank3d layer has one tap in space, not kernel {self.kernel}")
        return self

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
        if self.rank is not None:
            return self.rank * (self.in_width * kt + self.out_width) + self.out_width
        if self.operator == "dwsep3d":
            return self.in_width * kt * kh * kw + self.in_width * self.out_width + self.out_width
        return self.in_width * self.out_width * kt * kh * kw + self.out_width


class ConvBlockSpec(_Frozen):
    """A single convolution as a block (conv_in, the 1x1 around the latent)."""

    kind: Literal["conv"] = "conv"
    conv: ConvSpec


class ResBlockSpec(_Frozen):
    """norm1, SiLU, conv1, norm2, SiLU, conv2, plus the shortcut (identity if None)."""

    kind: Literal["resblock"] = "resblock"
    conv1: ConvSpec
    conv2: ConvSpec
    shortcut: ConvSpec | None = None

    @model_validator(mode="after")
    def _widths_chain(self) -> ResBlockSpec:
        if self.conv1.out_width != self.conv2.in_width:
            raise ValueError(f"conv1 gives {self.conv1.out_width} channels, conv2 takes {self.conv2.in_width}")
        if self.shortcut is None and self.conv1.in_width != self.conv2.out_width:
            raise ValueError(
                f"an identity shortcut cannot join {self.conv1.in_width} channels to {self.conv2.out_width}"
            )
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


class HeadSpec(_Frozen):
    """norm, SiLU, conv."""

    kind: Literal["head"] = "head"
    conv: ConvSpec


BlockSpec = Annotated[
    ConvBlockSpec | ResBlockSpec | AttentionSpec | UpsampleSpec | DownsampleSpec | HeadSpec,
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
    return block.conv.out_width


def block_layers(block: BlockSpec) -> dict[str, ConvSpec]:
    """The convolutions of a block by attribute name, in forward order (attention projections excepted)."""
    if isinstance(block, AttentionSpec):
        return {}
    fields = ("conv1", "conv2", "shortcut", "temporal", "spatial", "conv")
    if isinstance(block, DownsampleSpec):
        fields = ("spatial", "temporal")
    return {name: layer for name in fields if isinstance(layer := getattr(block, name, None), ConvSpec)}


class StageSpec(_Frozen):
    """A named run of blocks at one resolution, with the resampler that leaves it."""

    name: str
    blocks: tuple[BlockSpec, ...]


class CoderSpec(_Frozen):
    """A whole encoder or decoder: stages in forward order, each a run of blocks.

    `temporal_factor` and `spatial_factor` are pixels per latent: frames = 1 + temporal_factor * (T - 1).
    """

    family: str
    role: Literal["encoder", "decoder"]
    stages: tuple[StageSpec, ...]
    temporal_factor: int
    spatial_factor: int

    @model_validator(mode="after")
    def _widths_chain(self) -> CoderSpec:
        previous: tuple[str, int] | None = None
        for address, block in self.blocks():
            if previous is not None and previous[1] != block_in_width(block):
                raise ValueError(f"{previous[0]} gives {previous[1]} channels, {address} takes {block_in_width(block)}")
            previous = (address, block_out_width(block))
        return self

    @model_validator(mode="after")
    def _only_upsamplers_enlarge(self) -> CoderSpec:
        for address, block in self.blocks():
            for name, layer in block_layers(block).items():
                if layer.enlarges and not (isinstance(block, UpsampleSpec) and name == "spatial"):
                    raise ValueError(f"{address}.{name} cannot be {layer.operator}: only an upsampler's spatial layer")
        return self

    def blocks(self) -> Iterator[tuple[str, BlockSpec]]:
        """Every block with its address `stage.index`, in forward order."""
        for stage in self.stages:
            for index, block in enumerate(stage.blocks):
                yield f"{stage.name}.{index}", block

    def layers(self) -> Iterator[tuple[str, ConvSpec]]:
        """Every convolution with its address `stage.index.name`, in forward order."""
        for address, block in self.blocks():
            for name, layer in block_layers(block).items():
                yield f"{address}.{name}", layer

    def stage(self, name: str) -> StageSpec:
        """The stage of that name. Raises KeyError."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    def with_blocks(self, changed: dict[str, BlockSpec]) -> CoderSpec:
        """A copy with the blocks at the given addresses replaced; checked as a whole."""
        stages = tuple(
            StageSpec(
                name=stage.name,
                blocks=tuple(changed.get(f"{stage.name}.{i}", block) for i, block in enumerate(stage.blocks)),
            )
            for stage in self.stages
        )
        return CoderSpec(**{**dict(self), "stages": stages})


class DecoderSpec(CoderSpec):
    """A decoder: latents `[B, C, T, Hz, Wz]`, raw scale, to pixels `[B, 3, F, H, W]` in [-1, 1]."""

    role: Literal["decoder"] = "decoder"

    def with_blocks(self, changed: dict[str, BlockSpec]) -> DecoderSpec:
        """A copy with the blocks at the given addresses replaced; checked as a whole."""
        return DecoderSpec(**dict(super().with_blocks(changed)))

    @property
    def latent_width(self) -> int:
        """Number of latent channels."""
        return block_in_width(self.stages[0].blocks[0])


class EncoderSpec(CoderSpec):
    """An encoder: pixels to latent mean and log-variance, concatenated on the channel axis."""

    role: Literal["encoder"] = "encoder"
