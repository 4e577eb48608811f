from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from artifact_specs import (
    DECODER_SPEC,
    ENCODER_SPEC,
    filled,
    flash_spec,
    released_shapes,
    shapes_of,
    specs_of,
)
from pydantic import ValidationError
from torch.nn import functional as F

from flashvaed_cli.artifact.foreign.coders import coders_from_foreign, empty_coder
from flashvaed_cli.artifact.foreign.layouts import slots, to_foreign
from flashvaed_cli.artifact.foreign.shape_reading import spec_from_shapes
from flashvaed_cli.artifact.foreign.writing import to_program
from flashvaed_cli.decoders.modules.coder import Coder, Decoder, Encoder
from flashvaed_cli.decoders.modules.operators import OPERATORS
from flashvaed_cli.decoders.spec.blocks import ConvBlockSpec, UpsampleSpec
from flashvaed_cli.decoders.spec.coders import CoderSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec, Kernel
from flashvaed_cli.decoders.spec.light import light_spec
from flashvaed_cli.decoders.spec.operators import Operator
from flashvaed_cli.decoders.variants.expansion import expanded_decoder
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families import registry
from flashvaed_cli.families.layout import Layout
from flashvaed_cli.families.registry import LAYOUTS, get_family
from flashvaed_cli.families.separable import fold_separable
from flashvaed_cli.families.wan21.names import WAN_DIFFUSERS, WAN_ORIGINAL
from flashvaed_cli.families.wan22.names import WAN22_ORIGINAL

FAMILIES = ("wan2.1", "wan2.2", "qwen-image")
SPECS = {family: specs_of(family) for family in FAMILIES}
WAN_LAYOUTS = [layout for layout in LAYOUTS.values() if layout.family in FAMILIES]
every_layout = pytest.mark.parametrize("layout", WAN_LAYOUTS, ids=lambda layout: layout.name)


def coder(spec: CoderSpec) -> Coder:
    return filled(Encoder(spec) if spec.role == "encoder" else Decoder(spec))  # type: ignore[arg-type]


@every_layout
@pytest.mark.parametrize("name", SPECS["wan2.1"])
def test_there_and_back(layout: Layout, name: str) -> None:
    spec = SPECS[layout.family][name]
    own = coder(spec)
    foreign = to_foreign(own.state_dict(), spec, layout)
    back = coders_from_foreign(foreign, layout)[spec.role]
    assert back.spec == spec
    assert back.state_dict().keys() == own.state_dict().keys()
    for key, value in own.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key


IN_BLOCKS_NAMED_BY_PATHS = {"depthwise3d"}
ENLARGING = {"subpixel2d"}  # in files it is its twin


@pytest.mark.parametrize("operator", sorted(set(OPERATORS) - IN_BLOCKS_NAMED_BY_PATHS - ENLARGING))
def test_a_layer_of_every_operator_can_be_written(operator: Operator) -> None:
    """Its parameters have places in `artifact/foreign/layouts.py`, or it becomes dense in `variants/expansion.py`."""
    width, rank = DECODER_SPEC.latent_width, 2 if operator == "lowrank3d" else None
    kernels: list[Kernel] = [(3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1)]
    conv = next(conv for kernel in kernels if (conv := allowed(operator, width, kernel, rank)) is not None)
    own = Decoder(DECODER_SPEC.with_blocks({"conv_in.0": ConvBlockSpec(conv=conv)}))
    filled(own)
    written = expanded_decoder(own)
    places = {slot.ours: slot.shape for slot in slots(written.spec, WAN_ORIGINAL)}
    state = written.state_dict()
    unplaced = [name for name in state if name not in places or math.prod(places[name]) != state[name].numel()]
    assert not unplaced, f"no place that fits in artifact/foreign/layouts.py, and not made dense: {unplaced}"
    foreign = to_foreign(state, written.spec, WAN_ORIGINAL)
    read = coders_from_foreign(foreign, WAN_ORIGINAL)["decoder"]
    x = torch.randn(1, width, 3, 2, 2)
    expected = own(x)
    torch.testing.assert_close(read(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))  # float32


def allowed(operator: Operator, width: int, kernel: Kernel, rank: int | None) -> ConvSpec | None:
    try:
        return ConvSpec(operator=operator, in_width=width, out_width=width, kernel=kernel, rank=rank)
    except ValidationError:
        return None


@every_layout
@pytest.mark.parametrize("width", [1, 2, 6, 96])
def test_every_width_is_read_from_the_shapes(layout: Layout, width: int) -> None:
    of = get_family(layout.family)
    for spec in (of.decoder_spec(width, 16), of.encoder_spec(width, 16), of.decoder_spec(width, 5)):
        shapes = {slot.foreign: slot.shape for slot in slots(spec, layout)}
        assert spec_from_shapes(shapes, layout, spec.role) == spec


@every_layout
def test_each_parameter_has_one_place(layout: Layout) -> None:
    specs = SPECS[layout.family]
    places = [slot for name in ("original", "encoder") for slot in slots(specs[name], layout)]
    assert len({slot.foreign for slot in places}) == len(places)
    for spec in specs.values():
        own = {name: value.shape for name, value in empty_coder(spec).state_dict().items()}
        assert {slot.ours: slot.shape for slot in slots(spec, layout)}.keys() == own.keys()


def test_key_names_of_the_layouts() -> None:
    both = [slot.foreign for spec in (DECODER_SPEC, ENCODER_SPEC) for slot in slots(spec, WAN_ORIGINAL)]
    for name in (
        "conv1.bias",
        "conv2.weight",
        "decoder.conv1.weight",
        "decoder.middle.0.residual.0.gamma",
        "decoder.middle.1.to_qkv.weight",
        "decoder.upsamples.3.time_conv.weight",
        "decoder.upsamples.4.shortcut.weight",
        "decoder.upsamples.11.resample.1.bias",
        "decoder.upsamples.14.residual.6.weight",
        "decoder.head.0.gamma",
        "decoder.head.2.weight",
        "encoder.downsamples.5.time_conv.weight",
        "encoder.downsamples.10.residual.6.bias",
    ):
        assert name in both
    both = [slot.foreign for spec in (DECODER_SPEC, ENCODER_SPEC) for slot in slots(spec, WAN_DIFFUSERS)]
    for name in (
        "post_quant_conv.weight",
        "quant_conv.bias",
        "decoder.mid_block.attentions.0.proj.weight",
        "decoder.up_blocks.1.resnets.0.conv_shortcut.weight",
        "decoder.up_blocks.2.upsamplers.0.resample.1.weight",
        "decoder.norm_out.gamma",
        "decoder.conv_out.weight",
        "encoder.down_blocks.10.conv2.weight",
    ):
        assert name in both


def test_key_names_of_wan22() -> None:
    """The mapping in diffusers' conversion of Wan 2.2's own file."""
    both = [slot.foreign for name in ("original", "encoder") for slot in slots(SPECS["wan2.2"][name], WAN22_ORIGINAL)]
    for name in (
        "decoder.upsamples.0.upsamples.0.residual.2.weight",
        "decoder.upsamples.1.upsamples.3.time_conv.bias",
        "decoder.upsamples.2.upsamples.0.shortcut.weight",
        "decoder.upsamples.2.upsamples.3.resample.1.weight",
        "decoder.upsamples.3.upsamples.2.residual.6.bias",
        "encoder.downsamples.0.downsamples.2.resample.1.weight",
        "encoder.downsamples.3.downsamples.1.residual.0.gamma",
        "decoder.middle.1.to_qkv.weight",
        "conv2.weight",
    ):
        assert name in both
    assert not any("avg_shortcut" in name for name in both)
    flash = [slot.foreign for slot in slots(SPECS["wan2.2"]["flash"], WAN22_ORIGINAL)]
    assert [name for name in flash if "avg_shortcut" in name] == [
        f"decoder.upsamples.{i}.avg_shortcut.{end}" for i in (1, 2) for end in ("weight", "bias")
    ]


def test_released_student() -> None:
    shapes = released_shapes()
    assert len(shapes) == 156
    spec = spec_from_shapes(shapes, WAN_ORIGINAL, "decoder")
    operators = {address: layer.operator for address, layer in spec.layers()}
    assert operators["mid.0.conv1"] == operators["up1.2.conv2"] == "dwsep3d"
    assert operators["up1.0.shortcut"] == "pointwise"  # a separable layer with kernel 1x1x1
    assert operators["up2.0.conv1"] == operators["up3.2.conv2"] == "frame2d"
    assert operators["up2.0.shortcut"] == "pointwise"
    assert [spec.stage(name).blocks[0].in_width for name in ("mid", "up2", "up3")] == [384, 24, 12]


def test_released_student_loads_and_folds_its_depthwise_biases() -> None:
    tensors = {name: torch.randn(shape) for name, shape in released_shapes(8, 4, 2).items()}
    decoder = coders_from_foreign(tensors, WAN_ORIGINAL)["decoder"]

    def separable(x: torch.Tensor, place: str) -> torch.Tensor:
        weight, bias = (tensors[f"{place}.depthwise_conv.{end}"] for end in ("weight", "bias"))
        reach = weight.shape[-1] // 2
        x = F.conv3d(F.pad(x, (reach, reach, reach, reach, 2 * reach, 0)), weight, bias, groups=x.shape[1])
        return F.conv3d(x, tensors[f"{place}.pointwise_conv.weight"], tensors[f"{place}.pointwise_conv.bias"])

    for address, place, width in (
        ("mid.0.conv2", "decoder.middle.0.residual.6", 8),
        ("up1.0.conv1", "decoder.upsamples.4.residual.2", 4),
        ("up1.0.shortcut", "decoder.upsamples.4.shortcut", 4),
    ):
        x = torch.randn(1, width, 3, 5, 4)
        # Sums of up to 27 * 8 products in float32, in another order.
        torch.testing.assert_close(decoder.at(address)(x), separable(x, place), atol=1e-4, rtol=1e-5)


def test_a_released_student_is_written_with_its_names_and_shapes() -> None:
    """Its authors' class loads our file strictly: folded biases and separable shortcuts are restored."""
    shapes = released_shapes(8, 4, 2)
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    decoder = coders_from_foreign(tensors, WAN_ORIGINAL)["decoder"]
    written = to_program([(decoder.state_dict(), decoder.spec)], WAN_ORIGINAL, ((), ()))
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == shapes
    again = coders_from_foreign(written, WAN_ORIGINAL)["decoder"]
    assert all(torch.equal(again.get_parameter(name), tensor) for name, tensor in decoder.named_parameters())


def test_folding_keeps_unknown_tensors() -> None:
    plain = {"a.weight": torch.ones(2, 2), "b.depthwise_conv.weight": torch.ones(2, 1, 3, 3, 3)}
    assert fold_separable(plain).keys() == plain.keys()


def foreign_flash() -> dict[str, torch.Tensor]:
    return to_foreign(coder(flash_spec()).state_dict(), flash_spec(), WAN_ORIGINAL)


@pytest.mark.parametrize(
    "name",
    [
        "conv2.weight",
        "decoder.head.0.gamma",
        "decoder.middle.0.residual.2.depthwise_conv.weight",
        "decoder.middle.0.residual.2.pointwise_conv.weight",
        "decoder.middle.1.proj.bias",
        "decoder.upsamples.4.shortcut.weight",
        "decoder.upsamples.7.time_conv.weight",
        "decoder.upsamples.8.residual.6.bias",
    ],
)
def test_a_missing_tensor_is_named(name: str) -> None:
    tensors = foreign_flash()
    del tensors[name]
    expected = name.replace("depthwise_conv.", "")  # without it the layer counts as dense
    with pytest.raises(ArtifactError, match=rf"x: its tensors .*wan-original[\s\S]*1 missing: {expected}"):
        coders_from_foreign(tensors, WAN_ORIGINAL, "x")


def test_superfluous_tensors_are_named_with_their_count() -> None:
    tensors = foreign_flash() | {f"decoder.extra.{i}.weight": torch.ones(1) for i in range(20)}
    with pytest.raises(ArtifactError, match=r"20 unexpected: decoder\.extra\.0\.weight.*and 12 more"):
        coders_from_foreign(tensors, WAN_ORIGINAL)


def test_a_resampler_in_time_where_none_belongs_is_named() -> None:
    tensors = foreign_flash()
    tensors["decoder.upsamples.11.time_conv.weight"] = torch.ones(12, 6, 3, 1, 1)
    with pytest.raises(ArtifactError, match=r"unexpected: decoder\.upsamples\.11\.time_conv\.weight"):
        coders_from_foreign(tensors, WAN_ORIGINAL)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("decoder.middle.0.residual.0.gamma", (9,), r"expected \[16, 1, 1, 1\], found \[9\]"),
        ("decoder.middle.1.to_qkv.bias", (9,), r"expected \[48\], found \[9\]"),
        ("decoder.middle.0.residual.2.pointwise_conv.weight", (16, 9, 1, 1, 1), r"found \[16, 9, 1, 1, 1\]"),
        ("decoder.conv1.weight", (16,), r"found \[16\]"),
        ("decoder.conv1.weight", (9, 16, 3, 3, 3), r"conv_in\.0 gives 9 channels, mid\.0 takes 16"),
        ("decoder.upsamples.8.residual.2.weight", (5, 6, 3, 3), r"upsamples\.8: conv1 gives 5 channels, conv2 takes 3"),
    ],
)
def test_a_wrong_shape_is_named(name: str, shape: tuple[int, ...], message: str) -> None:
    tensors = foreign_flash() | {name: torch.zeros(shape)}
    with pytest.raises(ArtifactError, match=message):
        coders_from_foreign(tensors, WAN_ORIGINAL)


def test_half_a_vae_may_keep_the_other_halfs_layer_beside_the_latent() -> None:
    tensors = foreign_flash() | {"conv1.weight": torch.ones(32, 32, 1, 1, 1), "conv1.bias": torch.ones(32)}
    assert coders_from_foreign(tensors, WAN_ORIGINAL).keys() == {"decoder"}


@every_layout
def test_singleton_axes_do_not_matter(layout: Layout) -> None:
    spec = SPECS[layout.family]["flash"]
    own = coder(spec)
    tensors = to_foreign(own.state_dict(), spec, layout)
    flat = {name: t.flatten(1) if t.shape[2:].numel() == 1 and t.ndim > 1 else t for name, t in tensors.items()}
    assert shapes_of(flat) != shapes_of(tensors)
    back = coders_from_foreign(flat, layout)["decoder"]
    assert all(torch.equal(back.state_dict()[name], value) for name, value in own.state_dict().items())


def test_a_separable_resampler_is_read() -> None:
    spatial = ConvSpec(operator="dwsep3d", in_width=4, out_width=4, kernel=(1, 3, 3))
    up2 = DECODER_SPEC.stage("up2").blocks[3]
    assert isinstance(up2, UpsampleSpec)
    spec = DECODER_SPEC.with_blocks(
        {"up2.3": UpsampleSpec(spatial=spatial.model_copy(update={"in_width": up2.spatial.in_width}))}
    )
    shapes = {slot.foreign: slot.shape for slot in slots(spec, WAN_ORIGINAL)}
    assert spec_from_shapes(shapes, WAN_ORIGINAL, "decoder") == spec


def test_a_kind_of_block_needs_nothing_here_but_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains are in no layout; with names for their layers they are written and read like any other block."""
    original = get_family("wan2.1")
    spec = light_spec("tae", original.decoder_spec(8, 16)).model_copy(update={"family": "chains"})
    monkeypatch.setitem(
        registry.FAMILIES, "chains", replace(original, name="chains", decoder_spec=lambda _base_width, _latents: spec)
    )
    chain = {name: f"{name}.inner" for name in ("conv1", "conv2", "conv3", "shortcut")}
    places = {address: f"decoder.{address}" for address, _ in spec.blocks()}
    layout = replace(
        WAN_DIFFUSERS, family="chains", places={"decoder": places}, layers={**WAN_DIFFUSERS.layers, "chain": chain}
    )
    own = coder(spec)
    foreign = to_foreign(own.state_dict(), spec, layout)
    assert "decoder.up0.0.conv3.inner.weight" in foreign
    assert spec_from_shapes(shapes_of(foreign), layout, "decoder") == spec
