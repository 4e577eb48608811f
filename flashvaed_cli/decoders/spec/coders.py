"""The architecture of an encoder or decoder as data: stages of blocks, and the whole.

A spec lists every layer with its operator and widths. Pruned and converted decoders are built by the same code from
another spec, so a spec is all that an artifact needs beside its weights. Imports no torch: recipes, tables and the
command line read specs without paying for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field, FiniteFloat, model_validator

from flashvaed_cli.decoders.spec.blocks import BlockSpec, HeadSpec, UpsampleSpec
from flashvaed_cli.decoders.spec.convolutions import point_conv
from flashvaed_cli.decoders.spec.layers import ConvSpec, FrozenSpec, OmittingSpec, Width
from flashvaed_cli.errors import SpecError
from flashvaed_cli.limits import MAX_FACTOR, MAX_STAGE_BLOCKS, MAX_STAGES, MAX_TILE_LATENTS


class BypassSpec(FrozenSpec):
    """The input of a stage, brought to its output's grid and added to the output, past all blocks of the stage.

    One position of the coarser grid is a *cell* of `temporal_factor` x `spatial_factor` x `spatial_factor` positions
    of the finer one; wide channel c * cell_size + s is channel c at position s of the cell.

    Kinds:
        duplicate (up): wide channel w of the output is channel w // n of the input, n = out_width * cell_size /
            in_width. Or `conv` computes the wide channels: the copies, once either end has been pruned.
        average (down): output channel c is the mean of the n wide channels from c * n on, n = in_width * cell_size /
            out_width.
    The first frame of a video is the last of its cell.
    """

    kind: Literal["duplicate", "average"]
    in_width: Width
    out_width: Width
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
        """The same bypass between other widths, with a layer in place of copies."""
        conv = _bypass_conv(in_width, out_width, self.cell_size)
        return self.model_copy(update={"in_width": in_width, "out_width": out_width, "conv": conv})


def _bypass_conv(in_width: int, out_width: int, cell_size: int) -> ConvSpec:
    return point_conv(in_width, out_width * cell_size)


class StageSpec(FrozenSpec):
    """A named run of blocks at one resolution, up to the resampler that ends it; `bypass` leads past all of them."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    blocks: tuple[BlockSpec, ...] = Field(min_length=1, max_length=MAX_STAGE_BLOCKS)
    bypass: BypassSpec | None = None

    @model_validator(mode="after")
    def _bypass_fits_blocks(self) -> StageSpec:
        if self.bypass is None:
            return self
        ends = self.blocks[0].in_width, self.blocks[-1].out_width
        if ends != (self.bypass.in_width, self.bypass.out_width):
            raise ValueError(
                f"the bypass of {self.name} joins {self.bypass.in_width} channels to {self.bypass.out_width}, "
                f"its blocks {ends[0]} to {ends[1]}"
            )
        return self


class TemporalTiles(FrozenSpec):
    """How a coder that sees whole clips takes long ones: in tiles of `length` latents that begin `stride` apart.

    Each tile is a clip of its own. Where tiles overlap, the first frame of the later one is dropped, and the frames of
    the other shared latents are blended linearly, from the earlier tile to the later one.
    """

    length: int = Field(gt=0, le=MAX_TILE_LATENTS)
    stride: int = Field(gt=0, le=MAX_TILE_LATENTS)

    @model_validator(mode="after")
    def _tiles_cover_clips(self) -> TemporalTiles:
        if self.stride > self.length:
            raise ValueError(f"tiles of {self.length} latents that begin {self.stride} apart leave latents out")
        return self

    @property
    def overlap(self) -> int:
        """Latents that two tiles share."""
        return self.length - self.stride

    def resized(self, length: int) -> TemporalTiles:
        """Tiles of another length with the same overlap. Raises SpecError if nothing is left beside it."""
        if length < 1:
            raise SpecError(f"a clip holds at least 1 latent, not {length}")
        if length <= self.overlap:
            raise SpecError(
                f"clips of {length} latents leave nothing beside the {self.overlap} that they share: give at least "
                f"{self.overlap + 1}"
            )
        return TemporalTiles(length=length, stride=length - self.overlap)


class CoderSpec(OmittingSpec):
    """A whole encoder or decoder: stages in forward order, each a run of blocks.

    `temporal_factor` and `spatial_factor` are pixels per latent: frames = 1 + temporal_factor * (T - 1).
    The blocks see `patch` x `patch` pixels of a frame as channels of one position; `spatial_factor` counts pixels.
    `still`: no layer works in time, and the decoder is for single images (T = 1), whatever the `temporal_factor`.
    `temporal_tiles`: for a coder that sees whole clips, how long ones are cut; None: every clip is taken at once.
    """

    omitted_defaults: ClassVar[tuple[str, ...]] = ("temporal_tiles",)

    family: str
    role: Literal["encoder", "decoder"]
    stages: tuple[StageSpec, ...] = Field(min_length=1, max_length=MAX_STAGES)
    temporal_factor: int = Field(gt=0, le=MAX_FACTOR)
    spatial_factor: int = Field(gt=0, le=MAX_FACTOR)
    patch: int = Field(default=1, gt=0, le=MAX_FACTOR)
    still: bool = False
    temporal_tiles: TemporalTiles | None = None

    @model_validator(mode="after")
    def _temporal_tiles_fit(self) -> CoderSpec:
        tiles = self.temporal_tiles
        if tiles is not None and not self.sees_whole_clip:
            raise ValueError(
                "only a coder that sees whole clips has tiles in time; others give the same frames without"
            )
        if tiles is not None and self.temporal_factor > 1 and not tiles.overlap:
            raise ValueError("tiles in time must overlap if the first latent of a clip stands for a single frame")
        return self

    @model_validator(mode="after")
    def _widths_chain(self) -> CoderSpec:
        previous: tuple[str, int] | None = None
        for address, block in self.blocks():
            if previous is not None and previous[1] != block.in_width:
                raise ValueError(f"{previous[0]} gives {previous[1]} channels, {address} takes {block.in_width}")
            previous = (address, block.out_width)
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> CoderSpec:
        names = [stage.name for stage in self.stages]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two stages are called {repeated}")
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
            for name, layer in block.layers.items():
                if layer.enlarges and not (isinstance(block, UpsampleSpec) and name == "spatial"):
                    raise ValueError(f"{address}.{name} cannot be {layer.operator}: only an upsampler's spatial layer")
        return self

    @model_validator(mode="after")
    def _lead_frames_are_dropped(self) -> CoderSpec:
        blocks = [block for _, block in self.blocks()]
        doubling = [block for block in blocks if isinstance(block, UpsampleSpec) and block.temporal is not None]
        lead = sum(block.lead_frames for block in blocks if isinstance(block, HeadSpec))
        grows_first = any(block.grows_first for block in doubling)
        if grows_first and not all(block.grows_first for block in doubling):
            raise ValueError("either every upsampler doubles the first frame of a video, or none does")
        if lead != (self.temporal_factor - 1 if grows_first else 0):
            raise ValueError(f"{lead} lead frames are dropped, which do not fit the frames that the upsamplers make")
        return self

    def num_latents(self, num_frames: int) -> int:
        """Latent frames for so many frames of a video; always one for single images."""
        return 1 if self.still else 1 + -(-(num_frames - 1) // self.temporal_factor)

    def num_frames(self, num_latents: int) -> int:
        """Frames for so many latent frames."""
        return 1 + self.temporal_factor * (num_latents - 1)

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

        That of a bypass is `stage.index.bypass`, where `stage.index` is the stage's last block.
        """
        ending = {address: stage.bypass.conv for address, stage in self.bypassed().items() if stage.bypass}
        for address, block in self.blocks():
            for name, layer in block.layers.items():
                yield f"{address}.{name}", layer
            if (conv := ending.get(address)) is not None:
                yield f"{address}.bypass", conv

    def bypassed(self) -> dict[str, StageSpec]:
        """The stages that have a bypass, by the address of their last block."""
        return {f"{stage.name}.{len(stage.blocks) - 1}": stage for stage in self.stages if stage.bypass is not None}

    @property
    def is_causal(self) -> bool:
        """Whether no layer sees frames ahead or a whole clip, so that one chunk need only pass a state to the next."""
        return not self.sees_whole_clip and all(layer.num_ahead == 0 for _, layer in self.layers())

    @property
    def grows_state(self) -> bool:
        """Whether the state that a chunk passes to the next grows with the clip: through attention over its frames."""
        return self.is_causal and any(block.grows_state for _, block in self.blocks())

    @property
    def sees_whole_clip(self) -> bool:
        """Whether frames depend on the whole clip, through norms over clips."""
        return any(block.sees_whole_clip for _, block in self.blocks())

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
            ends, bypass = (blocks[0].in_width, blocks[-1].out_width), stage.bypass
            if bypass is not None and ends != (bypass.in_width, bypass.out_width):
                bypass = bypass.narrowed(*ends)
            stages.append(StageSpec(name=stage.name, blocks=blocks, bypass=bypass))
        return type(self)(**{**dict(self), "stages": tuple(stages)})


class DecoderSpec(CoderSpec):
    """A decoder: latents `[B, C, T, Hz, Wz]`, raw scale, to pixels `[B, 3, F, H, W]` in [-1, 1].

    `decode_timestep`: for a decoder that was conditioned on a timestep (the share of noise in the latents), the one
    that is built into its norms; None: it was not conditioned.
    """

    role: Literal["decoder"] = "decoder"
    decode_timestep: FiniteFloat | None = None

    def with_blocks(self, changed: dict[str, BlockSpec]) -> DecoderSpec:
        """A copy with the blocks at the given addresses replaced; checked as a whole."""
        return DecoderSpec(**dict(super().with_blocks(changed)))

    def with_clip_length(self, length: int | None) -> DecoderSpec:
        """A copy that takes `length` latents at a time, which gives other frames; None: clips of any length at once.

        Raises:
            SpecError: the decoder gives the same frames whatever it takes at a time, or `length` does not fit.
        """
        if not self.sees_whole_clip:
            raise SpecError(
                f"no clip length: the decoder of {self.family} gives the same frames whatever it takes at a time"
            )
        whole = TemporalTiles(length=1, stride=1)
        tiles = None if length is None else (self.temporal_tiles or whole).resized(length)
        return self.model_copy(update={"temporal_tiles": tiles})

    @property
    def latent_width(self) -> int:
        """Number of latent channels."""
        return self.stages[0].blocks[0].in_width


class EncoderSpec(CoderSpec):
    """An encoder: pixels to latent mean and log-variance, concatenated on the channel axis.

    `shared_variance`: one channel of log-variance for all latent channels instead of one for each.
    `opaque`: the first layer reads opacity as a fourth colour, which is 1 for every pixel.
    """

    role: Literal["encoder"] = "encoder"
    shared_variance: bool = False
    opaque: bool = False

    @property
    def latent_width(self) -> int:
        """Number of latent channels."""
        out_width = self.stages[-1].blocks[-1].out_width
        return out_width - 1 if self.shared_variance else out_width // 2
