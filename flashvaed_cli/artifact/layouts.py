"""Translate between our modules and a foreign layout, for any width, operator mix and pruning.

A `Layout` is data: the place of every block and the name of every layer inside a block. Widths, operators and
kernels are never configured; they are read from the shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError
from torch import Tensor

from flashvaed_cli.artifact.mismatch import Mismatch, Shape
from flashvaed_cli.decoders.families import get_family
from flashvaed_cli.decoders.layer_spec import (
    AttentionSpec,
    BlockSpec,
    ConvBlockSpec,
    ConvSpec,
    DownsampleSpec,
    HeadSpec,
    Kernel,
    NormSpec,
    Operator,
    ResBlockSpec,
    ShuffleUpsampleSpec,
    StridedDownsampleSpec,
    UnshuffleDownsampleSpec,
    UpsampleSpec,
    block_in_width,
    block_out_width,
)
from flashvaed_cli.decoders.spec import BypassSpec, CoderSpec, DecoderSpec, EncoderSpec, StageSpec
from flashvaed_cli.decoders.still import still_spec
from flashvaed_cli.errors import ArtifactError, SpecError

Role = Literal["decoder", "encoder"]
WeightShape = tuple[int, int, Kernel]

_BLOCK_SPECS: dict[str, type] = {
    "conv": ConvBlockSpec,
    "resblock": ResBlockSpec,
    "upsample": UpsampleSpec,
    "shuffle_upsample": ShuffleUpsampleSpec,
    "downsample": DownsampleSpec,
    "strided_downsample": StridedDownsampleSpec,
    "unshuffle_downsample": UnshuffleDownsampleSpec,
    "head": HeadSpec,
}
# The convolutions of each kind of block.
_CONVS: dict[str, tuple[str, ...]] = {
    "conv": ("conv",),
    "resblock": ("conv1", "conv2", "shortcut"),
    "upsample": ("temporal", "spatial"),
    "shuffle_upsample": ("conv",),
    "downsample": ("spatial", "temporal"),
    "strided_downsample": ("conv",),
    "unshuffle_downsample": ("conv",),
    "head": ("conv",),
}
# Each norm with the layer that reads it.
_NORMS: dict[str, dict[str, str]] = {"resblock": {"norm1": "conv1", "norm2": "conv2"}, "head": {"norm": "conv"}}


@dataclass(frozen=True)
class Layout:
    """One way of naming the tensors of a family.

    Attributes:
        places: per role, block address to the foreign name of the block (two blocks may share one); that of a
            stage's bypass is `STAGE.bypass`.
        layers: per kind of block, our layer name to the foreign name inside the block ("": the block itself).
        config_class: `_class_name` of the configuration that comes with such weights; None if none does.
        gain: what a norm's gain is called; its shift is its `bias`.
        by_blocks: no name is common to all variants; the layout is told by where its blocks lie.
        is_shifted: of a layout told by its blocks: the norms have shifts, or the tensors that these are made of.
        prepare: makes tensors as found, with the configuration, into those that this layout names.
    """

    name: str
    family: str
    places: Mapping[Role, Mapping[str, str]]
    layers: Mapping[str, Mapping[str, str]]
    config_class: str | None = None
    gain: str = "gamma"
    by_blocks: bool = False
    is_shifted: bool = False
    prepare: Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]] | None = None

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


def blueprint(layout: Layout, role: Role, config: Mapping[str, Any] | None = None) -> DecoderSpec | EncoderSpec:
    """The family's original at some small width: stages and kinds of blocks, and what a configuration says of them."""
    family = get_family(layout.family)
    build = family.decoder_spec if role == "decoder" else family.encoder_spec
    return family.configured(build(8, family.latent_width), config or {})


def spec_from_shapes(
    shapes: Mapping[str, Shape],
    layout: Layout,
    role: Role,
    location: str = "checkpoint",
    config: Mapping[str, Any] | None = None,
) -> DecoderSpec | EncoderSpec:
    """Read operator, widths and kernel of every layer from the shapes.

    A depthwise-separable layer without extent, (1, 1, 1), is read as the pointwise layer that it equals.

    Args:
        config: that of the checkpoint, for what shapes do not tell.
    Raises:
        ArtifactError: layers are missing, their widths do not fit together, or the configuration is of another network.
    """
    reader = _ShapeReader(shapes)
    try:
        plan = blueprint(layout, role, config)
    except SpecError as error:
        raise ArtifactError(f"{location}: in its configuration, {error}.") from error
    if isinstance(plan, DecoderSpec) and _is_still(shapes, layout, plan):
        plan = still_spec(plan)
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
        try:
            bypass = _read_bypass(reader, layout, role, stage, blocks)
            stages.append(StageSpec(name=stage.name, blocks=tuple(blocks), bypass=bypass))
        except ValidationError as error:
            clashes.append(_reasons(error))
    reader.mismatch.raise_if_any(location, layout.name)
    try:
        if not clashes:
            return type(plan).model_validate({**dict(plan), "stages": tuple(stages)})
    except ValidationError as error:
        clashes.append(_reasons(error))
    raise ArtifactError(f"{location}: the widths of its layers do not fit together: {'; '.join(clashes[:8])}.")


def _is_still(shapes: Mapping[str, Shape], layout: Layout, plan: DecoderSpec) -> bool:
    """Whether nothing of a decoder works in time: its temporal resamplers are absent and its entry has a 2D kernel."""
    temporal = [address for address, _ in plan.layers() if address.endswith(".temporal")]
    names = []
    for address in (*temporal, "conv_in.0.conv"):
        place, _, layer = address.rpartition(".")
        if place not in layout.places["decoder"]:
            return False
        kind = "conv" if layer == "conv" else "upsample"
        names.append(f"{layout.layer_place('decoder', place, kind, layer)}.weight")
    *absent, entry = names
    return bool(temporal) and not any(name in shapes for name in absent) and len(shapes.get(entry, ())) == 4


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
    padded = {layer: conv and _with_planned_padding(conv, getattr(planned, layer)) for layer, conv in layers.items()}
    return _BLOCK_SPECS[planned.kind](**{**_read_extras(reader, layout, planned, places), **padded})


def _with_planned_padding(found: ConvSpec, planned: ConvSpec | None) -> ConvSpec:
    if planned is None or found.operator == "pointwise":
        return found
    in_time = planned.time_padding if found.kernel[0] > 1 else "zeros"
    return found.model_copy(update={"time_padding": in_time, "space_padding": planned.space_padding})


def _read_extras(
    reader: _ShapeReader, layout: Layout, planned: BlockSpec, places: Mapping[str, str]
) -> dict[str, object]:
    """What a block has beside its layers: as planned, and for norms and noise as the shapes show."""
    extras: dict[str, object] = {}
    if isinstance(planned, ShuffleUpsampleSpec | StridedDownsampleSpec | UnshuffleDownsampleSpec):
        extras["factor"] = planned.factor
    if isinstance(planned, ShuffleUpsampleSpec):
        extras["residual"] = planned.residual
    if isinstance(planned, ResBlockSpec | HeadSpec) and planned.norm.eps is not None:
        place = places["norm1" if isinstance(planned, ResBlockSpec) else "norm"]
        gain, shift = f"{place}.{layout.gain}" in reader.shapes, f"{place}.bias" in reader.shapes
        extras["norm"] = NormSpec(eps=planned.norm.eps, gain=gain, shift=shift)
    if isinstance(planned, ResBlockSpec) and "noise1" in places:
        extras["shortcut_norm"] = f"{places['shortcut_norm']}.weight" in reader.shapes
        extras["noise"] = places["noise1"] in reader.shapes
    return extras


def _read_bypass(
    reader: _ShapeReader, layout: Layout, role: Role, planned: StageSpec, blocks: list[BlockSpec]
) -> BypassSpec | None:
    """The bypass of a stage, with a layer if the file has one; None too where the stage's own blocks are not whole."""
    if planned.bypass is None or len(blocks) < len(planned.blocks):
        return None
    ends = block_in_width(blocks[0]), block_out_width(blocks[-1])
    if f"{layout.places[role][f'{planned.name}.bypass']}.weight" in reader.shapes:
        return planned.bypass.narrowed(*ends)
    return BypassSpec(**{**dict(planned.bypass), "in_width": ends[0], "out_width": ends[1]})


def _may_lack(layer: str, planned: BlockSpec, layers: Mapping[str, ConvSpec | None]) -> bool:
    """Whether a block can do without a layer: a shortcut between equal widths, a resampler that keeps the frames."""
    if layer == "shortcut":
        conv1, conv2 = layers["conv1"], layers["conv2"]
        return conv1 is not None and conv2 is not None and conv1.in_width == conv2.out_width
    return layer == "temporal" and getattr(planned, layer) is None


def slots(spec: CoderSpec, layout: Layout) -> list[Slot]:
    """Every parameter of a spec, in forward order, with its place in a layout."""
    found: list[Slot] = []
    ending = spec.bypassed()
    for address, block in spec.blocks():
        found += _block_slots(spec.role, address, block, layout)
        stage = ending.get(address)
        if stage is not None and stage.bypass is not None and stage.bypass.conv is not None:
            place = layout.places[spec.role][f"{stage.name}.bypass"]
            found += _conv_slots(f"bypasses.{stage.name}.conv", place, stage.bypass.conv, on_frames=False)
    return found


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
    normed = _NORMS[block.kind].items() if isinstance(block, ResBlockSpec | HeadSpec) else ()
    for norm, layer in normed:
        conv: ConvSpec = getattr(block, layer)
        axes = (1, 1) if conv.operator == "frame2d" else (1, 1, 1)
        shape = (conv.in_width, *axes) if layout.gain == "gamma" else (conv.in_width,)
        norm_spec = block.norm  # type: ignore[union-attr]
        if norm_spec.gain:
            yield Slot(f"{ours}.{norm}.gamma", f"{places[norm]}.{layout.gain}", shape)
        if norm_spec.shift:
            yield Slot(f"{ours}.{norm}.beta", f"{places[norm]}.bias", shape)
    if isinstance(block, ResBlockSpec):
        yield from _extra_slots(ours, block, places)
    # A block that works on frames holds its 1x1 layers as 2D convolutions too.
    on_frames = isinstance(block, UpsampleSpec | DownsampleSpec) or (
        isinstance(block, ResBlockSpec) and block.conv1.operator == "frame2d"
    )
    for layer in _CONVS[block.kind]:
        conv = getattr(block, layer)
        if conv is not None:
            yield from _conv_slots(f"{ours}.{layer}", places[layer], conv, on_frames and layer != "temporal")


def _extra_slots(ours: str, block: ResBlockSpec, places: Mapping[str, str]) -> Iterator[Slot]:
    """The norm before a shortcut, and the scales of noise."""
    if block.shortcut_norm:
        place, width = places["shortcut_norm"], block.conv1.in_width
        yield Slot(f"{ours}.shortcut_norm.gamma", f"{place}.weight", (width,))
        yield Slot(f"{ours}.shortcut_norm.beta", f"{place}.bias", (width,))
    if block.noise:
        yield Slot(f"{ours}.noise1", places["noise1"], (block.conv1.out_width, 1, 1))
        yield Slot(f"{ours}.noise2", places["noise2"], (block.conv2.out_width, 1, 1))


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
