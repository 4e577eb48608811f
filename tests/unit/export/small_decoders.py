"""Small seeded decoders with every kind of block and operator that a graph can hold."""

from __future__ import annotations

import torch

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.spec.blocks import AttentionSpec, ConvBlockSpec, ResBlockSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec, StageSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec
from flashvaed_cli.decoders.spec.operators import Operator
from flashvaed_cli.families.wan21.spec import LATENT_WIDTH, wan_decoder_spec
from flashvaed_cli.surgery.respec import with_time_rank

BASE_WIDTH = 4


def layer(operator: Operator, in_width: int, out_width: int) -> ConvSpec:
    """A 3x3 layer of the operator, with three temporal taps where it has any."""
    taps = {"causal3d": (3, 3, 3), "dwsep3d": (3, 3, 3), "frame2d": (1, 3, 3), "pointwise": (1, 1, 1)}
    return ConvSpec(operator=operator, in_width=in_width, out_width=out_width, kernel=taps[operator])


def short_spec() -> DecoderSpec:
    """Wan at base width 4 with one block of each kind per stage, and two stages fewer: quick to trace."""
    spec = wan_decoder_spec(BASE_WIDTH)
    kept = {"mid": (1,), "up0": (0, 3), "up2": (0, 3)}
    stages = tuple(
        StageSpec(name=stage.name, blocks=tuple(stage.blocks[i] for i in kept.get(stage.name, (0,))))
        for stage in spec.stages
        if stage.name not in ("up1", "up3")
    )
    return DecoderSpec(**{**dict(spec), "stages": stages})


def shortest_spec() -> DecoderSpec:
    """The short decoder without what works in time: quick to compile."""
    spec = short_spec()
    entry = StageSpec(name="conv_in", blocks=(ConvBlockSpec(conv=layer("causal3d", LATENT_WIDTH, 8)),))
    return DecoderSpec(**{**dict(spec), "stages": (entry, *spec.stages[-2:]), "spatial_factor": 2})


def low_rank_spec() -> DecoderSpec:
    """The short decoder with its doubling of the frames at an eighth of the rank."""
    return with_time_rank(flash_spec(), 0.125)


def flash_spec() -> DecoderSpec:
    """The short decoder converted and pruned: depthwise-separable, per-frame and pointwise layers, odd widths."""
    return short_spec().with_blocks(
        {
            "mid.0": AttentionSpec(width=16, inner_width=6),
            "up0.0": ResBlockSpec(conv1=layer("dwsep3d", 16, 7), conv2=layer("dwsep3d", 7, 16)),
            "up2.0": ResBlockSpec(
                conv1=layer("frame2d", 8, 5), conv2=layer("frame2d", 5, 8), shortcut=layer("pointwise", 8, 8)
            ),
        }
    )


def small_decoder(spec: DecoderSpec) -> Decoder:
    """Seeded weights, biases too; the head is toned down so that few pixels are clamped."""
    torch.manual_seed(0)
    decoder = Decoder(spec).eval().requires_grad_(False)
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.1)
    decoder.get_parameter("stages.head.0.conv.weight").mul_(0.2)
    return decoder
