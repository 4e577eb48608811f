"""Read the spec of a coder from the shapes of its tensors: operator, widths and kernel of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from flashvaed_cli.artifact.foreign.layouts import blueprint
from flashvaed_cli.artifact.foreign.mismatch import Mismatch, Shape, reasons
from flashvaed_cli.decoders.spec.blocks import (
    AttentionSpec,
    BlockSpec,
    HeadSpec,
    ResBlockSpec,
)
from flashvaed_cli.decoders.spec.coders import BypassSpec, DecoderSpec, EncoderSpec, StageSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec, Kernel, TimePadding
from flashvaed_cli.decoders.spec.operators import Operator
from flashvaed_cli.decoders.variants.still import still_spec
from flashvaed_cli.errors import ArtifactError, SpecError
from flashvaed_cli.families.layout import Layout, Role
from flashvaed_cli.families.registry import get_family

WeightShape = tuple[int, int, Kernel]

_NUM_SHOWN = 2
"""Faults that a message names."""


def spec_from_shapes(
    shapes: Mapping[str, Shape],
    layout: Layout,
    role: Role,
    location: str = "checkpoint",
    config: Mapping[str, Any] | None = None,
) -> DecoderSpec | EncoderSpec:
    """Read operator, widths and kernel of every layer from the shapes.

    A depthwise-separable layer with kernel (1, 1, 1) is read as the pointwise layer that it equals.

    Args:
        config: of the checkpoint, for what shapes do not show.
    Raises:
        ArtifactError: layers are missing, widths do not fit together, or the configuration is for another network.
    """
    reader = _ShapeReader(shapes)
    try:
        plan = blueprint(layout, role, config)
        separable_padding = get_family(layout.family).config_keys.separable_padding(config or {})
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
                found = _read_block(reader, layout, role, address, block, separable_padding)
            except ValidationError as error:
                clashes.append(f"{place}: {reasons(error)}")
                continue
            if found is not None and found.group_fault is not None:
                clashes.append(f"{place}: {found.group_fault}, as norm_num_groups of a config.json beside it may say")
            elif found is not None:
                blocks.append(found)
        try:
            bypass = _read_bypass(reader, layout, role, stage, blocks)
            stages.append(StageSpec(name=stage.name, blocks=tuple(blocks), bypass=bypass))
        except ValidationError as error:
            clashes.append(reasons(error))
    reader.mismatch.raise_if_any(location, layout.name)
    try:
        if not clashes:
            return type(plan).model_validate({**dict(plan), "stages": tuple(stages)})
    except ValidationError as error:
        clashes.append(reasons(error))
    raise ArtifactError(f"{location}: the widths of its layers do not fit together: {_shown(clashes)}.")


def _shown(clashes: list[str]) -> str:
    more = f"; and {len(clashes) - _NUM_SHOWN} more" if len(clashes) > _NUM_SHOWN else ""
    return "; ".join(clashes[:_NUM_SHOWN]) + more


def _is_still(shapes: Mapping[str, Shape], layout: Layout, plan: DecoderSpec) -> bool:
    """Whether no layer of a decoder works in time: temporal resamplers are absent, and its entry (or its last layer, if
    the entry never works in time) has a 2D kernel."""
    in_time = [address for address, layer in plan.layers() if layer.kernel[0] > 1]
    if not in_time:
        return False  # nor does the original
    temporal = [address for address, _ in plan.layers() if address.endswith(".temporal")]
    kinds = {address: block.kind for address, block in plan.blocks()}
    names = []
    for address in (*temporal, "conv_in.0.conv" if "conv_in.0.conv" in in_time else in_time[-1]):
        place, _, layer = address.rpartition(".")
        if place not in layout.places["decoder"] or layer not in layout.layers.get(kinds[place], {}):
            return False  # no layer of a still decoder could have that name
        names.append(f"{layout.layer_place('decoder', place, kinds[place], layer)}.weight")
    *absent, entry = names
    return not any(name in shapes for name in absent) and len(shapes.get(entry, ())) == 4


class _ShapeReader:
    """Reads layers from shapes and collects all missing ones for a single error."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes = shapes
        self.mismatch = Mismatch()

    def weight(self, place: str) -> WeightShape | None:
        """Output width, input width and kernel of a weight of 2 to 5 axes; None, and noted, if there is none."""
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


def _read_block(
    reader: _ShapeReader,
    layout: Layout,
    role: Role,
    address: str,
    planned: BlockSpec,
    in_separable: TimePadding | None,
) -> BlockSpec | None:
    """The block at an address; None if a layer of it is missing (noted in the reader).

    Args:
        in_separable: how depthwise-separable layers pad in time, if not as planned.
    """
    if planned.has_path_names:
        return _read_paths(reader, layout.places[role][address], planned)
    places = {layer: layout.layer_place(role, address, planned.kind, layer) for layer in layout.layers[planned.kind]}
    if isinstance(planned, AttentionSpec):
        qkv, proj = reader.weight(places["qkv"]), reader.weight(places["proj"])
        if qkv is None or proj is None:
            return None
        return planned.model_copy(update={"width": qkv[1], "inner_width": proj[1]})
    layers: dict[str, ConvSpec | None] = {}
    for layer in planned.convolution_fields():
        optional = _may_lack(layer, planned, layers)
        layers[layer] = reader.conv(places[layer], optional=optional)
        if layers[layer] is None and not optional:
            return None
        if layer == "temporal" and layers[layer] is not None and getattr(planned, layer) is None:
            reader.mismatch.unexpected.append(f"{places[layer]}.weight")
    padded = {
        layer: conv and _with_planned_padding(conv, getattr(planned, layer), in_separable)
        for layer, conv in layers.items()
    }
    return type(planned)(**{**_read_extras(reader, layout, planned, places), **padded})


def _read_paths(reader: _ShapeReader, place: str, planned: BlockSpec) -> BlockSpec | None:
    """A block whose parts have paths as names: as planned, with the widths that the shapes show."""
    layers: dict[str, ConvSpec] = {}
    for name, layer in planned.layers.items():
        found = reader.weight(f"{place}.{name}")
        if found is not None:
            in_width = found[0] if layer.operator == "depthwise3d" else found[1]
            layers[name] = ConvSpec(operator=layer.operator, in_width=in_width, out_width=found[0], kernel=found[2])
    return planned.with_layers(layers) if len(layers) == len(planned.layers) else None


def _with_planned_padding(found: ConvSpec, planned: ConvSpec | None, in_separable: TimePadding | None) -> ConvSpec:
    if planned is None or found.operator == "pointwise":
        return found
    in_time = planned.time_padding if found.kernel[0] > 1 else "zeros"
    if in_separable is not None and found.operator == "dwsep3d":
        in_time = in_separable
    return found.model_copy(update={"time_padding": in_time, "space_padding": planned.space_padding})


def _read_extras(
    reader: _ShapeReader, layout: Layout, planned: BlockSpec, places: Mapping[str, str]
) -> dict[str, object]:
    """A block's fields other than layers: as planned, but norms and noise as the shapes show."""
    extras: dict[str, object] = {name: said for name, said in planned if name not in planned.convolution_fields()}
    norm = planned.norm if isinstance(planned, ResBlockSpec | HeadSpec) else None
    # A GroupNorm always has gain and shift: a file without them is incomplete.
    if norm is not None and norm.groups is None and norm.eps is not None:
        place = places[next(iter(planned.norms))]
        gain, shift = f"{place}.{layout.gain}" in reader.shapes, f"{place}.bias" in reader.shapes
        extras["norm"] = norm.model_copy(update={"gain": gain, "shift": shift})
    if isinstance(planned, ResBlockSpec) and "noise1" in places:
        extras["shortcut_norm"] = f"{places['shortcut_norm']}.weight" in reader.shapes
        extras["noise"] = places["noise1"] in reader.shapes
    return extras


def _read_bypass(
    reader: _ShapeReader, layout: Layout, role: Role, planned: StageSpec, blocks: list[BlockSpec]
) -> BypassSpec | None:
    """The bypass of a stage, with a layer if the file has one; None also if blocks of the stage are missing."""
    if planned.bypass is None or len(blocks) < len(planned.blocks):
        return None
    ends = blocks[0].in_width, blocks[-1].out_width
    if f"{layout.places[role][f'{planned.name}.bypass']}.weight" in reader.shapes:
        return planned.bypass.narrowed(*ends)
    return BypassSpec(**{**dict(planned.bypass), "in_width": ends[0], "out_width": ends[1]})


def _may_lack(layer: str, planned: BlockSpec, layers: Mapping[str, ConvSpec | None]) -> bool:
    """Whether a layer may be absent: a shortcut between equal widths, a layer of other frames or first ones alone."""
    if layer == "shortcut":
        conv1, conv2 = layers["conv1"], layers["conv2"]
        return conv1 is not None and conv2 is not None and conv1.in_width == conv2.out_width
    return layer in ("temporal", "first") and getattr(planned, layer) is None
