"""The shape that most families share: residual blocks at several widths with a resampler between them, and attention
at the widest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from flashvaed_cli.decoders.spec.blocks import AttentionSpec, BlockSpec, ConvBlockSpec, HeadSpec, ResBlockSpec
from flashvaed_cli.decoders.spec.coders import BypassSpec, StageSpec
from flashvaed_cli.decoders.spec.convolutions import point_conv
from flashvaed_cli.decoders.spec.layers import ConvSpec, NormSpec


@dataclass(frozen=True)
class Ladder:
    """What the stages of a coder are made of; `decoder_stages` and `encoder_stages` put them together.

    Attributes:
        conv: builds a dense layer from its widths.
        norm: of every block.
        context: of attention.
        follower: builds a block of one width that follows each residual block; None: none does.
    """

    conv: Callable[[int, int], ConvSpec]
    norm: NormSpec = field(default_factory=NormSpec)
    context: Literal["frame", "clip"] = "frame"
    follower: Callable[[int], ResBlockSpec] | None = None

    def decoder_stages(
        self,
        latent_width: int,
        widths: Sequence[int],
        upsampler: Callable[[int, int], BlockSpec],
        *,
        out_width: int = 3,
        has_quant: bool = True,
        doubles: Sequence[bool] | None = None,
    ) -> list[StageSpec]:
        """Entry, attention, an up stage of three residual blocks for each width, head.

        Args:
            widths: of the up stages, the widest first.
            upsampler: the block that ends the up stage of an index and width; the last has none.
            out_width: channels of the head.
            has_quant: a 1x1 layer on the latents comes first.
            doubles: the stages have bypasses of copies, whose cells span two frames where the upsampler of that index
                doubles frames; None: there are no bypasses.
        """
        entering = widths[0]
        stages = [post_quant_stage(latent_width)] if has_quant else []
        stages += [_stage("conv_in", ConvBlockSpec(conv=self.conv(latent_width, entering))), self._middle(entering)]
        for index, width in enumerate(widths):
            blocks = [block for first in (entering, width, width) for block in self._blocks(first, width)]
            bypass = None
            if index + 1 < len(widths):
                blocks.append(upsampler(index, width))
                if doubles is not None:
                    bypass = _bypass("duplicate", entering, width, frames=doubles[index], size=True)
            stages.append(StageSpec(name=f"up{index}", blocks=tuple(blocks), bypass=bypass))
            entering = blocks[-1].out_width
        return [*stages, self._head(entering, out_width)]

    def encoder_stages(
        self,
        latent_width: int,
        widths: Sequence[int],
        downsampler: Callable[[int, int], BlockSpec],
        *,
        in_width: int = 3,
        has_quant: bool = True,
        halves: Sequence[bool] | None = None,
    ) -> list[StageSpec]:
        """Entry, a down stage of two residual blocks for each width, attention, head for mean and log-variance.

        Args:
            widths: of the down stages, the narrowest first, which is the entry's too.
            downsampler: the block that ends the down stage of an index and width; the last has none.
            in_width: channels that the entry reads.
            has_quant: a 1x1 layer on mean and log-variance comes last.
            halves: the stages have bypasses of means, over two frames where the downsampler of that index halves
                frames; None: there are no bypasses.
        """
        entering = widths[0]
        stages = [_stage("conv_in", ConvBlockSpec(conv=self.conv(in_width, entering)))]
        for index, width in enumerate(widths):
            blocks = [block for first in (entering, width) for block in self._blocks(first, width)]
            shrinks = index + 1 < len(widths)
            blocks += [downsampler(index, width)] if shrinks else []
            bypass = None
            if halves is not None:
                bypass = _bypass("average", entering, width, frames=shrinks and halves[index], size=shrinks)
            stages.append(StageSpec(name=f"down{index}", blocks=tuple(blocks), bypass=bypass))
            entering = blocks[-1].out_width
        stages += [self._middle(entering), self._head(entering, 2 * latent_width)]
        return [*stages, quant_stage(latent_width)] if has_quant else stages

    def _blocks(self, in_width: int, out_width: int) -> list[BlockSpec]:
        """A residual block with a 1x1 shortcut where the width changes, and its follower."""
        block = ResBlockSpec(
            conv1=self.conv(in_width, out_width),
            conv2=self.conv(out_width, out_width),
            shortcut=None if in_width == out_width else point_conv(in_width, out_width),
            norm=self.norm,
        )
        return [block] if self.follower is None else [block, self.follower(out_width)]

    def _middle(self, width: int) -> StageSpec:
        blocks = self._blocks(width, width)
        attention = AttentionSpec(width=width, inner_width=width, norm=self.norm, context=self.context)
        return _stage("mid", *blocks, attention, *blocks)

    def _head(self, in_width: int, out_width: int) -> StageSpec:
        return _stage("head", HeadSpec(conv=self.conv(in_width, out_width), norm=self.norm))


def post_quant_stage(latent_width: int) -> StageSpec:
    """The 1x1 layer on the latents that a decoder may begin with."""
    return _stage("post_quant", ConvBlockSpec(conv=point_conv(latent_width, latent_width)))


def quant_stage(latent_width: int) -> StageSpec:
    """The 1x1 layer on mean and log-variance that an encoder may end with."""
    return _stage("quant", ConvBlockSpec(conv=point_conv(2 * latent_width, 2 * latent_width)))


def _stage(name: str, *blocks: BlockSpec) -> StageSpec:
    return StageSpec(name=name, blocks=blocks)


def _bypass(
    kind: Literal["duplicate", "average"], in_width: int, out_width: int, *, frames: bool, size: bool
) -> BypassSpec:
    return BypassSpec(
        kind=kind,
        in_width=in_width,
        out_width=out_width,
        temporal_factor=2 if frames else 1,
        spatial_factor=2 if size else 1,
    )
