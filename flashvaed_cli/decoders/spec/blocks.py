"""The kinds of block as data, and what each states about itself.

Cost, memory, roofline, tiles, lookahead, channel groups and names in checkpoints loop over these properties; a new kind
of block states them once. What must differ by kind is in tables (`KINDS` lists the kinds; a test checks that every
table has all of them): the module, and how a block is narrowed and its weights are transferred and fitted.

Imports no torch. Reference: Wan 2.1 VAE, LTX-Video, HunyuanVideo 1.5; TAESD and TAEHV (chains).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from flashvaed_cli.decoders.spec.block import Block, Grid, InnerTensor, Reader
from flashvaed_cli.decoders.spec.layers import (
    Activation,
    ConvSpec,
    LatentEntrySpec,
    NormSpec,
    Width,
)
from flashvaed_cli.decoders.spec.naf_blocks import CellHeadSpec, CellStemSpec, IstaSpec, NafSpec
from flashvaed_cli.decoders.spec.resamplers import (
    CellDownsampleSpec,
    CellUpsampleSpec,
    DownsampleSpec,
    ShuffleUpsampleSpec,
    StridedDownsampleSpec,
    UnshuffleDownsampleSpec,
    UpsampleSpec,
)
from flashvaed_cli.limits import MAX_FACTOR


class ConvBlockSpec(Block):
    """A single convolution as a block (conv_in, the 1x1 around the latent).

    Attributes:
        activation: after it.
        entry: what happens to raw latents before it.
    """

    omitted_defaults: ClassVar[tuple[str, ...]] = ("activation", "entry")

    has_still_form: ClassVar[bool] = True

    kind: Literal["conv"] = "conv"
    conv: ConvSpec
    activation: Activation = "none"
    entry: LatentEntrySpec | None = None

    @model_validator(mode="after")
    def _entry_fits(self) -> ConvBlockSpec:
        if self.entry is not None and self.entry.mean and len(self.entry.mean) != self.conv.in_width:
            raise ValueError(f"{len(self.entry.mean)} statistics for {self.conv.in_width} latent channels")
        return self

    @property
    def ends_stream(self) -> bool:
        """Its output has the channels of the next stage."""
        return True


class ResBlockSpec(Block):
    """norm1, SiLU, conv1, norm2, SiLU, conv2, plus the shortcut (identity if None).

    Attributes:
        norm: both norms of the main path.
        norm2: the second of them, if pruning has left it other groups than the first.
        shortcut_norm: a layer norm over the channels, with gain and shift, comes before the shortcut.
        noise: both convolutions have learned scales for noise, which are kept and written; no noise is added.
    """

    omitted_defaults: ClassVar[tuple[str, ...]] = ("norm2",)

    has_still_form: ClassVar[bool] = True

    kind: Literal["resblock"] = "resblock"
    conv1: ConvSpec
    conv2: ConvSpec
    shortcut: ConvSpec | None = None
    norm: NormSpec = NormSpec()
    norm2: NormSpec | None = None
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
            raise ValueError("a norm before the shortcut needs a shortcut that is not an identity")
        return self

    @property
    def inner_tensors(self) -> dict[str, InnerTensor]:
        """The tensor between both convolutions."""
        reader = Reader(layer="conv2", norm="norm2")
        return {"conv1": InnerTensor(group="inner", width=self.conv1.out_width, producer="conv1", reader=reader)}

    @property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        """The main path, and the shortcut."""
        return (("conv1", "conv2"), ()) if self.shortcut is None else (("conv1", "conv2"), ("shortcut",))

    @property
    def out_width(self) -> int:
        """Of the main path."""
        return self.conv2.out_width

    @property
    def norms(self) -> dict[str, tuple[NormSpec, int]]:
        """Those of the main path."""
        return {"norm1": (self.norm, self.conv1.in_width), "norm2": (self.norm2 or self.norm, self.conv2.in_width)}

    @property
    def norm_parameters(self) -> int:
        """Those of both norms of the main path, and of the shortcut's norm."""
        return super().norm_parameters + 2 * self.conv1.in_width * self.shortcut_norm

    @property
    def writers(self) -> tuple[str, ...]:
        """The end of the main path, and the shortcut."""
        return ("conv2",) if self.shortcut is None else ("conv2", "shortcut")

    @property
    def readers(self) -> tuple[Reader, ...]:
        """The beginning of the main path, and the shortcut."""
        main = Reader(layer="conv1", norm="norm1")
        if self.shortcut is None:
            return (main,)
        return (main, Reader(layer="shortcut", norm="shortcut_norm" if self.shortcut_norm else None))

    @property
    def carries_input(self) -> bool:
        """If the shortcut is an identity."""
        return self.shortcut is None


class ChainSpec(Block):
    """Two or three convolutions with ReLU between them, plus the shortcut (identity if None); no norm.

    `activation` comes after the sum.
    """

    has_still_form: ClassVar[bool] = True

    kind: Literal["chain"] = "chain"
    conv1: ConvSpec
    conv2: ConvSpec
    conv3: ConvSpec | None = None
    shortcut: ConvSpec | None = None
    activation: Literal["none", "relu"] = "relu"

    @model_validator(mode="after")
    def _widths_chain(self) -> ChainSpec:
        for before, after in pairwise(self.path):
            if self.layers[before].out_width != self.layers[after].in_width:
                raise ValueError(
                    f"{before} gives {self.layers[before].out_width} channels, {after} takes "
                    f"{self.layers[after].in_width}"
                )
        if self.shortcut is None and self.in_width != self.out_width:
            raise ValueError(f"an identity shortcut cannot join {self.in_width} channels to {self.out_width}")
        if self.shortcut is not None and (
            self.shortcut.operator != "pointwise"
            or (self.shortcut.in_width, self.shortcut.out_width) != (self.in_width, self.out_width)
        ):
            raise ValueError(f"the shortcut is pointwise, {self.in_width} to {self.out_width} channels")
        return self

    @property
    def path(self) -> tuple[str, ...]:
        """The convolutions of the main path."""
        return tuple(name for name in self.layers if name != "shortcut")

    @property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        """The main path, and the shortcut."""
        return (self.path, () if self.shortcut is None else ("shortcut",))

    @property
    def out_width(self) -> int:
        """Of the main path."""
        return self.layers[self.path[-1]].out_width

    @property
    def writers(self) -> tuple[str, ...]:
        """The end of the main path, and the shortcut."""
        return (self.path[-1],) if self.shortcut is None else (self.path[-1], "shortcut")

    @property
    def inner_tensors(self) -> dict[str, InnerTensor]:
        """The outputs of all convolutions of the main path but the last."""
        found = {}
        for index, (name, following) in enumerate(pairwise(self.path), start=1):
            group = "inner" if index == 1 else f"inner{index}"
            width, reader = self.layers[name].out_width, Reader(layer=following)
            found[name] = InnerTensor(group=group, width=width, producer=name, reader=reader)
        return found

    @property
    def readers(self) -> tuple[Reader, ...]:
        """The beginning of the main path, and the shortcut."""
        return tuple(Reader(layer=name) for name in ("conv1", *(() if self.shortcut is None else ("shortcut",))))

    @property
    def carries_input(self) -> bool:
        """If the shortcut is an identity."""
        return self.shortcut is None


class AttentionSpec(Block):
    """Single-head self-attention, residual.

    Attributes:
        inner_width: of q, k and v.
        context: the positions that one attends to: all of its own frame, or all of its own and of all earlier frames
            of the clip, whose keys and values are the state between chunks.
    """

    omitted_defaults: ClassVar[tuple[str, ...]] = ("norm", "context")

    has_still_form: ClassVar[bool] = True

    kind: Literal["attention"] = "attention"
    width: Width
    inner_width: Width
    norm: NormSpec = NormSpec()
    context: Literal["frame", "clip"] = "frame"

    @property
    def norms(self) -> dict[str, tuple[NormSpec, int]]:
        """The norm before q, k and v."""
        return {"norm": (self.norm, self.width)}

    @property
    def in_width(self) -> int:
        """Of the residual stream."""
        return self.width

    @property
    def out_width(self) -> int:
        """Of the residual stream."""
        return self.width

    @property
    def writers(self) -> tuple[str, ...]:
        """The projection."""
        return ("proj",)

    @property
    def readers(self) -> tuple[Reader, ...]:
        """Query, key and value as one layer."""
        return (Reader(layer="qkv", norm="norm"),)

    @property
    def carries_input(self) -> bool:
        """Always: it is residual."""
        return True

    @property
    def sees_whole_frames(self) -> bool:
        """It mixes all positions of a frame."""
        return True

    @property
    def grows_state(self) -> bool:
        """If it reads all earlier frames."""
        return self.context == "clip"


class HeadSpec(Block):
    """norm (if not None), activation, conv; the first `lead_frames` frames of a video are dropped first."""

    omitted_defaults: ClassVar[tuple[str, ...]] = ("activation", "lead_frames")

    has_still_form: ClassVar[bool] = True

    kind: Literal["head"] = "head"
    conv: ConvSpec
    norm: NormSpec | None = NormSpec()
    activation: Activation = "silu"
    lead_frames: Annotated[int, Field(ge=0, lt=MAX_FACTOR)] = 0

    def grid_after(self, grid: Grid) -> Grid:
        """Without the dropped frames."""
        return (grid[0] - self.lead_frames, *grid[1:])

    @property
    def norms(self) -> dict[str, tuple[NormSpec, int]]:
        """Its norm, if it has one."""
        return {} if self.norm is None else {"norm": (self.norm, self.conv.in_width)}

    @property
    def readers(self) -> tuple[Reader, ...]:
        """The layer after the norm."""
        return (Reader(layer="conv", norm=None if self.norm is None else "norm"),)


_Blocks = (
    ConvBlockSpec
    | ResBlockSpec
    | ChainSpec
    | AttentionSpec
    | UpsampleSpec
    | ShuffleUpsampleSpec
    | DownsampleSpec
    | StridedDownsampleSpec
    | UnshuffleDownsampleSpec
    | CellUpsampleSpec
    | CellDownsampleSpec
    | HeadSpec
    | NafSpec
    | IstaSpec
    | CellStemSpec
    | CellHeadSpec
)
BlockSpec = Annotated[_Blocks, Field(discriminator="kind")]
KINDS: dict[str, type[Block]] = {one.model_fields["kind"].default: one for one in get_args(_Blocks)}
"""Every kind of block."""
