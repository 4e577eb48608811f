"""Translate between our modules and a foreign layout, for any width, operator mix and pruning.

A `Layout` is data: the place of every block and the name of every layer inside a block. Widths, operators and
kernels are never configured; they are read from the shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError
from torch import Tensor

from flashvaed_cli.artifact.mismatch import Mismatch, Shape
from flashvaed_cli.decoders.families import get_family
from flashvaed_cli.decoders.spec import (
    AttentionSpec,
    BlockSpec,
    CoderSpec,
    ConvBlockSpec,
    ConvSpec,
    DecoderSpec,
    DownsampleSpec,
    EncoderSpec,
    HeadSpec,
    Kernel,
    Operator,
    ResBlockSpec,
    StageSpec,
    UpsampleSpec,
)
from flashvaed_cli.errors import ArtifactError

Role = Literal["decoder", "encoder"]
WeightShape = tuple[int, int, Kernel]

_BLOCK_SPECS: dict[str, type] = {
    "conv": ConvBlockSpec,
    "resblock": ResBlockSpec,
    "upsample": UpsampleSpec,
    "downsample": DownsampleSpec,
    "head": HeadSpec,
}
# The convolutions of each kind of block.
_CONVS: dict[str, tuple[str, ...]] = {
    "conv": ("conv",),
    "resblock": ("conv1", "conv2", "shortcut"),
    "upsample": ("temporal", "spatial"),
    "downsample": ("spatial", "temporal"),
    "head": ("conv",),
}
# Each norm with the layer that reads it.
_NORMS: dict[str, dict[str, str]] = {"resblock": {"norm1": "conv1", "norm2": "conv2"}, "head": {"norm": "conv"}}


@dataclass(frozen=True)
class Layout:
    """One way of naming the tensors of a family.

    Attributes:
        places: per role, block address to the foreign name of the block (two blocks may share one).
        layers: per kind of block, our layer name to the foreign name inside the block ("": the block itself).
    """

    name: str
    family: str
    places: Mapping[Role, Mapping[str, str]]
    layers: Mapping[str, Mapping[str, str]]

    def layer_place(self, role: Role, address: str, kind: str, layer: str) -> str:
        """The foreign name of a layer, less `.weight`."""
        place, name = self.places[role][address], self.layers[kind][layer]
        return f"{place}.{name}" if name else place


@dataclass(frozen=True)
class Slot:
    """One parameter: its name in our module, its name and shape in the foreign layout."""

    ours: str
    foreign: str
    shape: Shape


def blueprint(layout: Layout, role: Role) -> DecoderSpec | EncoderSpec:
    """The family's original at some small width: stages and kinds of blocks, which no variant changes."""
    family = get_family(layout.family)
    build = family.decoder_spec if role == "decoder" else family.encoder_spec
    return build(8, family.latent_width)


def spec_from_shapes(
    shapes: Mapping[str, Shape], layout: Layout, role: Role, location: str = "checkpoint"
) -> DecoderSpec | EncoderSpec:
    """Read operator, widths and kernel of every layer from the shapes.

    A depthwise-separable layer without extent, (1, 1, 1), is read as the pointwise layer that it equals.

    Raises:
        ArtifactError: layers are missing, or their widths do not fit together.
    """
    reader = _ShapeReader(shapes)
    plan = blueprint(layout, role)
    stages: list[StageSpec] = []
    clashes: list[str] = []
    for stage in plan.stages:
        blocks: list[BlockSpec] = []
        for index, block in enumerate(stage.blocks):
            address = f"{stage.name}.{index}"
            place = layout.places[role][address]
            try:
                found = _read_block(reader, layout, role, address, block)
            except ValidationError as error:
                clashes.append(f"{place}: {_reasons(error)}")
                continue
            if found is not None:
                blocks.append(found)
        stages.append(StageSpec(name=stage.name, blocks=tuple(blocks)))
    reader.mismatch.raise_if_any(location, layout.name)
    try:
        if not clashes:
            return type(plan).model_validate({**dict(plan), "stages": tuple(stages)})
    except ValidationError as error:
        clashes.append(_reasons(error))
    raise ArtifactError(f"{location}: the widths of its layers do not fit together: {'; '.join(clashes[:8])}.")


def _reasons(error: ValidationError) -> str:
    return "; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())


class _ShapeReader:
    """Reads layers from shapes and collects all that is missing, so that one error can name it."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes = shapes
        self.mismatch = Mismatch()

    def weight(self, place: str) -> WeightShape | None:
        """Widths out and in, and kernel, of a weight of 2 to 5 axes; None and a note if there is none."""
        shape = self.shapes.get(f"{place}.weight")
        if shape is None:
            self.mismatch.missing.append(f"{place}.weight")
        elif not 2 <= len(shape) <= 5 or 0 in shape:
            self.mismatch.wrong.append(f"{place}.weight (expected a kernel of 2 to 5 axes, found {list(shape)})")
        else:
            # A 2D kernel sees one frame: [O, C, kh, kw] is [O, C, 1, kh, kw].
            kernel = (1, *shape[2:]) if len(shape) == 4 else (*shape[2:], 1, 1, 1)
            return shape[0], shape[1], (kernel[0], kernel[1], kernel[2])
        return None

    def conv(self, place: str, *, optional: bool = False) -> ConvSpec | None:
        """The convolution at a place; None if it is not there (noted unless `optional`)."""
        if f"{place}.depthwise_conv.weight" in self.shapes:
            depthwise, pointwise = self.weight(f"{place}.depthwise_conv"), self.weight(f"{place}.pointwise_conv")
            if depthwise is None or pointwise is None:
                return None
            operator: Operator = "pointwise" if depthwise[2] == (1, 1, 1) else "dwsep3d"
            return ConvSpec(operator=operator, in_width=depthwise[0], out_width=pointwise[0], kernel=depthwise[2])
        if optional and f"{place}.weight" not in self.shapes:
            return None
        weight = self.weight(place)
        if weight is None:
            return None
        out_width, in_width, kernel = weight
        operator = "causal3d" if len(self.shapes[f"{place}.weight"]) == 5 else "frame2d"
        if kernel == (1, 1, 1):
            operator = "pointwise"
        return ConvSpec(operator=operator, in_width=in_width, out_width=out_width, kernel=kernel)


def _read_block(reader: _ShapeReader, layout: Layout, role: Role, address: str, planned: BlockSpec) -> BlockSpec | None:
    """The block at an address; None if a layer of it is missing (noted in the reader)."""
    places = {layer: layout.layer_place(role, address, planned.kind, layer) for layer in layout.layers[planned.kind]}
    if isinstance(planned, AttentionSpec):
        qkv, proj = reader.weight(places["qkv"]), reader.weight(places["proj"])
        return None if qkv is None or proj is None else AttentionSpec(width=qkv[1], inner_width=proj[1])
    layers: dict[str, ConvSpec | None] = {}
    for layer in _CONVS[planned.kind]:
        optional = _may_lack(layer, planned, layers)
        layers[layer] = reader.conv(places[layer], optional=optional)
        if layers[layer] is None and not optional:
            return None
        if layer == "temporal" and layers[layer] is not None and getattr(planned, layer) is None:
            reader.mismatch.unexpected.append(f"{places[layer]}.weight")
    return _BLOCK_SPECS[planned.kind](**layers)


def _may_lack(layer: str, planned: BlockSpec, layers: Mapping[str, ConvSpec | None]) -> bool:
    """Whether a block can do without a layer: a shortcut between equal widths, a resampler that keeps the frames."""
    if layer == "shortcut":
        conv1, conv2 = layers["conv1"], layers["conv2"]
        return conv1 is not None and conv2 is not None and conv1.in_width == conv2.out_width
    return layer == "temporal" and getattr(planned, layer) is None


def slots(spec: CoderSpec, layout: Layout) -> list[Slot]:
    """Every parameter of a spec, in forward order, with its place in a layout."""
    return [slot for address, block in spec.blocks() for slot in _block_slots(spec.role, address, block, layout)]


def _block_slots(role: Role, address: str, block: BlockSpec, layout: Layout) -> Iterator[Slot]:
    stage, index = address.split(".")
    ours = f"stages.{stage}.{index}"
    places = {layer: layout.layer_place(role, address, block.kind, layer) for layer in layout.layers[block.kind]}
    if isinstance(block, AttentionSpec):
        inner, width = block.inner_width, block.width
        yield Slot(f"{ours}.norm.gamma", f"{places['norm']}.gamma", (width, 1, 1))
        for layer, shape in (("qkv", (3 * inner, width, 1, 1)), ("proj", (width, inner, 1, 1))):
            yield Slot(f"{ours}.{layer}.weight", f"{places[layer]}.weight", shape)
            yield Slot(f"{ours}.{layer}.bias", f"{places[layer]}.bias", shape[:1])
        return
    for norm, layer in _NORMS.get(block.kind, {}).items():
        conv: ConvSpec = getattr(block, layer)
        axes = (1, 1) if conv.operator == "frame2d" else (1, 1, 1)
        yield Slot(f"{ours}.{norm}.gamma", f"{places[norm]}.gamma", (conv.in_width, *axes))
    # A block that works on frames holds its 1x1 layers as 2D convolutions too.
    on_frames = isinstance(block, UpsampleSpec | DownsampleSpec) or (
        isinstance(block, ResBlockSpec) and block.conv1.operator == "frame2d"
    )
    for layer in _CONVS[block.kind]:
        conv = getattr(block, layer)
        if conv is not None:
            yield from _conv_slots(f"{ours}.{layer}", places[layer], conv, on_frames and layer != "temporal")


def _conv_slots(ours: str, foreign: str, layer: ConvSpec, on_frames: bool) -> Iterator[Slot]:
    widths = (layer.out_width, layer.in_width)
    if layer.operator == "dwsep3d":
        yield Slot(f"{ours}.depthwise", f"{foreign}.depthwise_conv.weight", (layer.in_width, 1, *layer.kernel))
        foreign = f"{foreign}.pointwise_conv"
        shape = (*widths, 1, 1, 1)
    elif layer.operator == "frame2d" or (layer.operator == "pointwise" and on_frames):
        shape = (*widths, *layer.kernel[1:])
    else:
        shape = (*widths, *layer.kernel)
    yield Slot(f"{ours}.weight", f"{foreign}.weight", shape)
    yield Slot(f"{ours}.bias", f"{foreign}.bias", (layer.out_width,))


def to_foreign(tensors: Mapping[str, Tensor], spec: CoderSpec, layout: Layout) -> dict[str, Tensor]:
    """Our state dict under the names and shapes of a layout (views where possible)."""
    return {slot.foreign: tensors[slot.ours].reshape(slot.shape) for slot in slots(spec, layout)}


def fold_separable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rewrite the parts of a depthwise-separable layer that our operators do not have; exact but for rounding.

    A depthwise bias d moves into the pointwise bias, b + P d: the zero padding comes before the depthwise
    convolution, so d reaches every position. A depthwise kernel without extent scales the columns of P, which
    makes a plain pointwise layer. Tensors that do not fit each other are left for the strict check to name.
    """
    folded = dict(tensors)
    for name in [name for name in tensors if name.endswith(".depthwise_conv.weight")]:
        place = name.removesuffix(".depthwise_conv.weight")
        depthwise, pointwise = folded[name], folded.get(f"{place}.pointwise_conv.weight")
        bias, depthwise_bias = folded.get(f"{place}.pointwise_conv.bias"), folded.get(f"{place}.depthwise_conv.bias")
        if pointwise is None or bias is None or pointwise.ndim < 2 or pointwise.shape[1] != depthwise.shape[0]:
            continue
        matrix = pointwise.flatten(1).double()  # [O, C]
        if depthwise_bias is not None and matrix.shape == (bias.numel(), depthwise_bias.numel()):
            bias = (bias.double() + matrix @ depthwise_bias.double()).float()
            del folded[f"{place}.depthwise_conv.bias"]
            folded[f"{place}.pointwise_conv.bias"] = bias
        if depthwise.numel() == depthwise.shape[0]:
            for suffix in ("depthwise_conv.weight", "pointwise_conv.weight", "pointwise_conv.bias"):
                folded.pop(f"{place}.{suffix}")
            scaled = (matrix * depthwise.flatten().double()).float()
            folded[f"{place}.weight"] = scaled.reshape(*scaled.shape, 1, 1, 1)
            folded[f"{place}.bias"] = bias
    return folded
