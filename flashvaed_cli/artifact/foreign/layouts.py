"""Translate between our modules and a foreign layout, at any widths and with any operators.

Widths, operators and kernels are read from the shapes, never from a configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flashvaed_cli.artifact.foreign.mismatch import Shape
from flashvaed_cli.decoders.spec.addresses import split_block
from flashvaed_cli.decoders.spec.blocks import (
    AttentionSpec,
    BlockSpec,
    DownsampleSpec,
    ResBlockSpec,
    UpsampleSpec,
)
from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec, EncoderSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec
from flashvaed_cli.decoders.spec.naf_blocks import IstaSpec
from flashvaed_cli.families.layout import Layout, Role
from flashvaed_cli.families.registry import get_family


@dataclass(frozen=True)
class Slot:
    """One parameter: its name in our module, its name and shape in the foreign layout."""

    ours: str
    foreign: str
    shape: Shape


def blueprint(layout: Layout, role: Role, config: Mapping[str, Any] | None = None) -> DecoderSpec | EncoderSpec:
    """The family's original at a small width, as a configuration describes it: stages and kinds of blocks."""
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
    stage, index = split_block(address)
    ours = f"stages.{stage}.{index}"
    if block.has_path_names:
        yield from _path_slots(ours, layout.places[role][address], block)
        return
    places = {layer: layout.layer_place(role, address, block.kind, layer) for layer in layout.layers[block.kind]}
    yield from _norm_slots(ours, block, places, layout.gain)
    if isinstance(block, AttentionSpec):
        inner, width = block.inner_width, block.width
        for layer, shape in (("qkv", (3 * inner, width, 1, 1)), ("proj", (width, inner, 1, 1))):
            yield Slot(f"{ours}.{layer}.weight", f"{places[layer]}.weight", shape)
            yield Slot(f"{ours}.{layer}.bias", f"{places[layer]}.bias", shape[:1])
    if isinstance(block, ResBlockSpec):
        yield from _extra_slots(ours, block, places)
    # A block that works on frames holds its 1x1 layers as 2D convolutions too.
    on_frames = isinstance(block, UpsampleSpec | DownsampleSpec) or (
        isinstance(block, ResBlockSpec) and block.conv1.operator == "frame2d"
    )
    for layer in block.convolution_fields():
        conv = getattr(block, layer)
        if conv is not None:
            yield from _conv_slots(f"{ours}.{layer}", places[layer], conv, on_frames and layer != "temporal")


def _path_slots(ours: str, place: str, block: BlockSpec) -> Iterator[Slot]:
    """For a block whose parts have paths as names: the same paths under its place."""
    for name, layer in block.layers.items():
        widths = (layer.out_width, 1 if layer.operator == "depthwise3d" else layer.in_width)
        kernel = layer.kernel if layer.operator == "depthwise3d" else ()
        yield Slot(f"{ours}.{name}.weight", f"{place}.{name}.weight", (*widths, *kernel))
        yield Slot(f"{ours}.{name}.bias", f"{place}.{name}.bias", (layer.out_width,))
    for name, width in block.layer_norms.items():
        yield Slot(f"{ours}.{name}.gamma", f"{place}.{name}.weight", (width,))
        yield Slot(f"{ours}.{name}.beta", f"{place}.{name}.bias", (width,))
    if isinstance(block, IstaSpec):
        for name in ("steps", "thresholds"):
            yield Slot(f"{ours}.{name}", f"{place}.{name}", (len(block.analysis),))


def _norm_slots(ours: str, block: BlockSpec, places: Mapping[str, str], gain: str) -> Iterator[Slot]:
    """Gains and shifts, with the axes that a 2D or 3D layer after the norm asks for where they are `gamma`."""
    reading = {reader.norm: reader.layer for reader in block.readers}
    reading |= {inner.reader.norm: inner.reader.layer for inner in block.inner_tensors.values()}
    for name, (norm, width) in block.norms.items():
        layer = block.layers.get(reading[name])  # None: queries, keys and values of frames
        axes = (1, 1) if layer is None or layer.operator == "frame2d" else (1, 1, 1)
        shape = (width, *axes) if gain == "gamma" else (width,)
        if norm.gain:
            yield Slot(f"{ours}.{name}.gamma", f"{places[name]}.{gain}", shape)
        if norm.shift:
            yield Slot(f"{ours}.{name}.beta", f"{places[name]}.bias", shape)


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
