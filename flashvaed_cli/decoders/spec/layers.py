"""The layers of an encoder or decoder as data: every convolution with its operator and widths, every norm.

Imports no torch: recipes, tables and the command line read specs without paying for it.

Reference: Wan 2.1 VAE; arXiv 2602.19161, section 3.2 for the operator set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_serializer, model_validator

from flashvaed_cli.decoders.spec.operators import OPERATOR_FACTS, Operator
from flashvaed_cli.limits import MAX_FACTOR, MAX_TAPS, MAX_WIDTH

Width = Annotated[int, Field(gt=0, le=MAX_WIDTH)]
"""Channels."""
_Taps = Annotated[int, Field(gt=0, le=MAX_TAPS)]
Kernel = tuple[_Taps, _Taps, _Taps]
_Cells = Annotated[int, Field(gt=0, le=MAX_FACTOR)]
Factor = tuple[_Cells, _Cells, _Cells]
"""Frames, rows and columns made of one position, or made into one."""
SpacePadding = Literal["zeros", "reflect", "replicate"]
"""What a kernel reads beyond a frame's border: zeros, the frame mirrored at its outermost pixels, or those repeated."""
TimePadding = Literal["zeros", "first", "edges", "zeros_around"]
"""What a kernel reads beyond a video's ends: zeros before it, or its first frame repeated; centred: both edge frames
repeated, or zeros before and after it."""
CENTRED: frozenset[TimePadding] = frozenset({"edges", "zeros_around"})
"""The paddings of kernels that see as many frames ahead as back; the others are causal."""
Activation = Literal["none", "relu", "silu"]


class FrozenSpec(BaseModel):
    """A part of a spec: complete, checked, and not to be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OmittingSpec(FrozenSpec):
    """A part that leaves fields with their default out of headers.

    Artifacts that do not use these fields stay readable for versions that do not know them.
    """

    omitted_defaults: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """The fields, without those of `omitted_defaults` that have their default."""
        absent = {
            name for name in self.omitted_defaults if getattr(self, name) == type(self).model_fields[name].default
        }
        return {name: value for name, value in handler(self).items() if name not in absent}


class LatentEntrySpec(FrozenSpec):
    """What a decoder does with raw latents before its first layer: normalize them, then clamp them softly.

    Attributes:
        mean, std: per channel, so that normalized = (raw - mean) / std; both empty: the latents stay raw.
        limit: bound of the latents' magnitude, by limit * tanh(latents / limit); None: no clamp.
    """

    mean: tuple[FiniteFloat, ...] = ()
    std: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()
    limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _statistics_match(self) -> LatentEntrySpec:
        if len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} means of latent channels, but {len(self.std)} deviations")
        return self


class NormSpec(OmittingSpec):
    """RMS norm of each position over the channels, or GroupNorm; then a learned gain and shift.

    Attributes:
        eps: added to the mean square (with `groups`, to the variance); None: the vector's norm is clamped to at least
            1e-12 instead.
        gain: a factor per channel, `gamma`.
        shift: a summand per channel, `beta`.
        groups: number of equal runs of channels, each normalised by its own mean and variance.
            None: no GroupNorm.
        over: what a group's statistics are taken over: each frame, or all frames of a clip.
    """

    omitted_defaults: ClassVar[tuple[str, ...]] = ("groups", "over")

    eps: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    gain: bool = True
    shift: bool = False
    groups: Width | None = None
    over: Literal["frame", "clip"] = "frame"

    @model_validator(mode="after")
    def _groups_have_an_eps(self) -> NormSpec:
        if self.groups is not None and self.eps is None:
            raise ValueError("a GroupNorm needs an eps, as frames without contrast have no variance")
        if self.over == "clip" and self.groups is None:
            raise ValueError("only GroupNorm has statistics over clips; the other norms are of single positions")
        return self

    def narrowed(self, width: int, kept: int) -> NormSpec:
        """The norm over `kept` of `width` channels: with a gain; a GroupNorm keeps the groups that are whole.

        Raises:
            ValueError: `kept` is no whole number of groups.
        """
        if self.groups is None:
            return self.model_copy(update={"gain": True})
        size = width // self.groups
        if kept % size:
            raise ValueError(
                f"GroupNorm over groups of {size} channels keeps whole groups, not {kept} of {width} channels"
            )
        return self.model_copy(update={"gain": True, "groups": kept // size})


class ConvSpec(OmittingSpec):
    """One convolution: `[B, in_width, T, H, W]` to `[B, out_width, T, H, W]`, with bias.

    Its operators are in `operators.py`.

    `time_padding`: `zeros` and `first` are causal, `edges` and `zeros_around` see as many frames ahead as behind. A
    layer with one temporal tap has none to choose.
    """

    omitted_defaults: ClassVar[tuple[str, ...]] = ("rank",)

    operator: Operator
    in_width: Width
    out_width: Width
    kernel: Kernel
    time_padding: TimePadding = "zeros"
    space_padding: SpacePadding = "zeros"
    rank: Width | None = None

    @model_validator(mode="after")
    def _kernel_fits_operator(self) -> ConvSpec:
        if any(taps % 2 == 0 for taps in self.kernel[1:]):
            raise ValueError(f"a kernel has an odd number of taps in space, not {self.kernel}")
        if (self.operator == "lowrank3d") != (self.rank is not None):
            raise ValueError(f"rank {self.rank} in a {self.operator} layer: lowrank3d has one, no other operator has")
        if self.time_padding != "zeros" and self.kernel[0] == 1:
            raise ValueError(f"a layer with one temporal tap pads nothing in time, not {self.time_padding}")
        if self.time_padding in CENTRED and self.kernel[0] % 2 == 0:
            raise ValueError(f"a centred kernel has an odd number of temporal taps, not {self.kernel[0]}")
        if (fault := OPERATOR_FACTS[self.operator].fault(self)) is not None:
            raise ValueError(fault)
        return self

    @property
    def num_past(self) -> int:
        """Frames before a position that the layer reads."""
        return self.kernel[0] - 1 - self.num_ahead

    @property
    def num_ahead(self) -> int:
        """Frames after a position that the layer reads; 0 if it is causal."""
        return self.kernel[0] // 2 if self.time_padding in CENTRED else 0

    @property
    def plain_operator(self) -> Operator:
        """The operator itself, or the one that it is an exact twin of."""
        return OPERATOR_FACTS[self.operator].twin_of or self.operator

    @property
    def enlarges(self) -> bool:
        """Whether the layer doubles the size of the frames, as only an upsampler's `spatial` may."""
        return self.operator == "subpixel2d"

    @property
    def parameter_count(self) -> int:
        """Weights and bias."""
        return OPERATOR_FACTS[self.operator].weights(self) + self.out_width
