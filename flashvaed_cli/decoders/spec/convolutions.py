"""The convolutions that specs are written with, by their widths. Imports no torch."""

from __future__ import annotations

from flashvaed_cli.decoders.spec.layers import ConvSpec


def causal_conv(in_width: int, out_width: int) -> ConvSpec:
    """A dense causal 3x3x3 layer."""
    return ConvSpec(operator="causal3d", in_width=in_width, out_width=out_width, kernel=(3, 3, 3))


def time_conv(in_width: int, out_width: int) -> ConvSpec:
    """A causal layer over three frames."""
    return ConvSpec(operator="causal3d", in_width=in_width, out_width=out_width, kernel=(3, 1, 1))


def frame_conv(in_width: int, out_width: int) -> ConvSpec:
    """A dense 3x3 layer on every frame by itself."""
    return ConvSpec(operator="frame2d", in_width=in_width, out_width=out_width, kernel=(1, 3, 3))


def point_conv(in_width: int, out_width: int) -> ConvSpec:
    """A 1x1x1 layer."""
    return ConvSpec(operator="pointwise", in_width=in_width, out_width=out_width, kernel=(1, 1, 1))
