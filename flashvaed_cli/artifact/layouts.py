"""Translate between our modules and a foreign layout, for any width, operator mix and pruning.

A `Layout` is data: the place of every block and the name of every layer inside a block. Widths, operators and
kernels are never configured; they are read from the shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from flashvaed_cli.artifact.mismatch import Shape
from flashvaed_cli.decoders.families import get_family
from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec, EncoderSpec
from flashvaed_cli.decoders.spec.layers import (
    AttentionSpec,
    BlockSpec,
    ConvSpec,
    DownsampleSpec,
    HeadSpec,
    ResBlockSpec,
    UpsampleSpec,
)

Role = Literal["decoder", "encoder"]

# The convolutions of each kind of block.
CONVS: dict[str, tuple[str, ...]] = {
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
        implied: what the names of a file say beyond its configuration, as keys of one.
        finish: the way back, for files that other programs are to read.
        statistics: what the latents' mean and deviation are called, where they stand among the weights.
        prefix: of all names in the program's own files.
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
    implied: Callable[[Iterable[str]], dict[str, Any]] | None = None
    finish: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    statistics: tuple[str, str] | None = None
    prefix: str = ""

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
    for layer in CONVS[block.kind]:
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


def unfold_separable(tensors: Mapping[str, Tensor], *, conv1: str, shortcut: str) -> dict[str, Tensor]:
    """What the released students' classes have that `fold_separable` takes away, so that they load a file strictly.

    Every depthwise layer gets a bias, of zeros. The shortcut of a depthwise-separable block becomes such a layer too,
    with a depthwise kernel of ones. The frames stay the same.

    Args:
        conv1, shortcut: what a residual block calls its first layer and its shortcut.
    """
    unfolded = dict(tensors)
    end = f".{conv1}.depthwise_conv.weight"
    for place in [name.removesuffix(end) for name in tensors if name.endswith(end)]:
        weight = unfolded.pop(f"{place}.{shortcut}.weight", None)
        if weight is not None:
            unfolded[f"{place}.{shortcut}.depthwise_conv.weight"] = weight.new_ones(weight.shape[1], 1, 1, 1, 1)
            unfolded[f"{place}.{shortcut}.pointwise_conv.weight"] = weight
            unfolded[f"{place}.{shortcut}.pointwise_conv.bias"] = unfolded.pop(f"{place}.{shortcut}.bias")
    for name in [name for name in unfolded if name.endswith(".depthwise_conv.weight")]:
        unfolded[f"{name.removesuffix('weight')}bias"] = unfolded[name].new_zeros(unfolded[name].shape[0])
    return unfolded
