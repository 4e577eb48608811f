"""Small decoders and batches for the tests of distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.spec.blocks import ResBlockSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec, StageSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec
from flashvaed_cli.decoders.spec.operators import Operator
from flashvaed_cli.families.wan21.spec import wan_decoder_spec

BASE_WIDTH = 2
FULL_SPEC = wan_decoder_spec(BASE_WIDTH)
_BLOCKS_LEFT = {
    "post_quant": (0,),
    "conv_in": (0,),
    "mid": (0, 1),
    "up0": (0, 3),
    "up2": (0, 3),
    "up3": (0, 1),
    "head": (0,),
}


def short_spec(base_width: int = BASE_WIDTH) -> DecoderSpec:
    """Wan's decoder with a block of each kind: tests that train are bound by the number of layers."""
    full = wan_decoder_spec(base_width)
    stages = tuple(
        StageSpec(name=name, blocks=tuple(full.stage(name).blocks[i] for i in left))
        for name, left in _BLOCKS_LEFT.items()
    )
    return full.model_copy(update={"stages": stages, "temporal_factor": 2, "spatial_factor": 4})


def teacher_decoder(base_width: int = BASE_WIDTH) -> Decoder:
    """An original decoder with random weights."""
    torch.manual_seed(7)
    return Decoder(short_spec(base_width)).eval()


def converted_spec(spec: DecoderSpec, operators: dict[str, Operator]) -> DecoderSpec:
    """The residual blocks of some stages with another operator."""

    def swapped(layer: ConvSpec, operator: Operator) -> ConvSpec:
        kernel = (1, 3, 3) if operator == "frame2d" else (3, 3, 3)
        return layer.model_copy(update={"operator": operator, "kernel": kernel})

    changed = {}
    for address, block in spec.blocks():
        operator = operators.get(address.split(".")[0])
        if operator is not None and isinstance(block, ResBlockSpec):
            changed[address] = block.model_copy(
                update={"conv1": swapped(block.conv1, operator), "conv2": swapped(block.conv2, operator)}
            )
    return spec.with_blocks(changed)


def student_decoder(operators: dict[str, Operator] | None = None) -> Decoder:
    """A converted decoder: the teacher's weights where the operators are the same, random ones elsewhere."""
    teacher = teacher_decoder()
    student = Decoder(converted_spec(teacher.spec, operators or {"mid": "dwsep3d", "up3": "frame2d"}))
    weights = student.state_dict()
    known = {k: v for k, v in teacher.state_dict().items() if k in weights and weights[k].shape == v.shape}
    student.load_state_dict(known, strict=False)
    return student.eval()


def pruned_spec(spec: DecoderSpec, width: int) -> DecoderSpec:
    """up3 with a narrower stream and inside: entry at full width, 1x1 shortcuts."""

    def layer(operator: Operator, in_width: int, out_width: int) -> ConvSpec:
        kernel = (1, 1, 1) if operator == "pointwise" else (3, 3, 3)
        return ConvSpec(operator=operator, in_width=in_width, out_width=out_width, kernel=kernel)

    changed = {}
    for address, block in spec.blocks():
        if address.startswith("up3.") and isinstance(block, ResBlockSpec):
            in_width = block.conv1.in_width if address == "up3.0" else width
            changed[address] = ResBlockSpec(
                conv1=layer("causal3d", in_width, width),
                conv2=layer("causal3d", width, width),
                shortcut=layer("pointwise", in_width, width),
            )
    head = dict(spec.blocks())["head.0"]
    changed["head.0"] = head.model_copy(update={"conv": layer("causal3d", width, 3)})
    return spec.with_blocks(changed)


def batches(step: int) -> tuple[Tensor, ...]:
    """Raw latents of a step: two clips of 3 frames of 12 x 12 pixels."""
    return (torch.randn(2, 16, 2, 3, 3, generator=torch.Generator().manual_seed(step)),)
