from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flashvaed_cli.decoders.modules import winograd
from flashvaed_cli.decoders.modules.coder import Coder
from flashvaed_cli.decoders.predict.cost import stage_costs, total_gflop
from flashvaed_cli.decoders.spec.blocks import AttentionSpec, BlockSpec, ConvBlockSpec, UpsampleSpec
from flashvaed_cli.decoders.spec.coders import CoderSpec, StageSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec, Kernel
from flashvaed_cli.decoders.spec.operators import Operator
from tests.toy import DECODER_SPECS, original_spec, toy_decoder, toy_encoder

CODERS: dict[str, Coder] = {name: toy_decoder(spec) for name, spec in DECODER_SPECS.items()}
CODERS["encoder"] = toy_encoder()
GRIDS = {True: (9, 16, 24), False: (3, 2, 3)}  # encoder: pixels; decoder: latents


def grid_of(name: str) -> tuple[int, int, int]:
    return GRIDS[name == "encoder"]


@pytest.mark.parametrize("name", CODERS)
def test_parameters_are_those_of_the_module(name: str) -> None:
    coder = CODERS[name]
    costs = stage_costs(coder.spec, grid_of(name))
    assert sum(cost.parameters for cost in costs) == coder.parameter_count
    for cost in costs:
        assert cost.parameters == sum(p.numel() for p in coder.stages[cost.name].parameters())


def over_frames(
    x: torch.Size,
    weight: torch.Size,
    _bias: object,
    _stride: object,
    padding: list[int],
    *_: object,
    out_shape: torch.Size,
    **__: object,
) -> int:
    """Products of Winograd's convolution over time, without the outputs that begin after the last frame."""
    outputs = out_shape[0] * out_shape[1] * (out_shape[2] - padding[0]) * out_shape[3]
    return 2 * outputs * weight[1:].numel()


def counted_flop(coder: Coder, grid: tuple[int, int, int], **mapping: Any) -> dict[str, int]:
    width = next(coder.spec.layers())[1].in_width
    with torch.no_grad(), FlopCounterMode(display=False, **mapping) as counter:
        coder(torch.zeros(1, width, *grid))
    return {str(operator): flop for operator, flop in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("num_frames", [1, 2, 3])
@pytest.mark.parametrize("name", CODERS)
def test_convolutions_cost_what_torch_counts(name: str, num_frames: int) -> None:
    frames, height, width = grid_of(name)
    grid = (num_frames if frames == 3 else 1 + 4 * (num_frames - 1), height, width)
    costs = stage_costs(CODERS[name].spec, grid)
    expected = sum(layer.flop for cost in costs for layer in cost.layers if layer.operator != "attention")
    assert counted_flop(CODERS[name], grid)["aten.convolution"] == expected  # integers: no tolerance


@pytest.mark.parametrize("num_frames", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("operator", "kernel"),
    [
        ("tapwise3d", (3, 3, 3)),
        ("tapwise3d", (3, 1, 1)),
        ("stacked3d", (3, 3, 3)),
        ("winograd3d", (3, 3, 3)),
        ("winograd3d", (1, 3, 3)),
    ],
)
def test_twins_cost_what_torch_counts(
    operator: Operator, kernel: Kernel, num_frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "is_worthwhile", lambda *_, **__: True)
    spec = one_layer(ConvBlockSpec(conv=ConvSpec(operator=operator, in_width=4, out_width=6, kernel=kernel)))
    grid = (num_frames, 6, 9)
    [layer] = stage_costs(spec, grid)[0].layers
    own = {"custom_mapping": {torch.ops.aten.convolution: over_frames}} if operator == "winograd3d" else {}
    assert layer.flop == sum(counted_flop(Coder(spec), grid, **own).values())


def test_subpixel_costs_four_ninths_and_enlarges_nothing() -> None:
    plain = ConvSpec(operator="frame2d", in_width=4, out_width=2, kernel=(1, 3, 3))
    exact = plain.model_copy(update={"operator": "subpixel2d"})
    before, after = (stage_costs(one_layer(UpsampleSpec(spatial=layer)), (3, 8, 9))[0] for layer in (plain, exact))
    assert after.flop * 9 == before.flop * 4
    assert before.peak_activation_elements == 3 * 16 * 18 * (4 + 2)
    assert after.peak_activation_elements == 3 * 8 * 9 * 4 + 3 * 16 * 18 * 2
    counted = counted_flop(Coder(one_layer(UpsampleSpec(spatial=exact))), (3, 8, 9))["aten.convolution"]
    assert counted == after.flop // (8 * 9) * (9 * 10)  # a margin of one small pixel


def one_layer(block: BlockSpec) -> CoderSpec:
    stages = (StageSpec(name="only", blocks=(block,)),)
    return CoderSpec(family="test", role="decoder", stages=stages, temporal_factor=1, spatial_factor=1)


def test_attention_costs_its_products() -> None:
    grid = (3, 2, 3)
    layers = {layer.address: layer for cost in stage_costs(original_spec(), grid) for layer in cost.layers}
    block = original_spec().stage("mid").blocks[1]
    assert isinstance(block, AttentionSpec)
    counted = counted_flop(CODERS["original"], grid)
    projections = sum(counted.get(f"aten.{name}", 0) for name in ("mm", "addmm", "bmm", "baddbmm"))
    # Multiply-add, frames, QKᵀ and AV, positions squared: whether torch counts the fused kernel depends on its version.
    mixing = 2 * 3 * 2 * 6 * 6 * block.inner_width
    assert layers["mid.1"].flop == projections + mixing
    assert layers["mid.1"].operator == "attention"


def test_total_is_the_sum() -> None:
    costs = stage_costs(original_spec(), (3, 2, 3))
    assert total_gflop(original_spec(), (3, 2, 3)) == pytest.approx(sum(cost.flop for cost in costs) / 1e9)
    assert [cost.name for cost in costs] == [stage.name for stage in original_spec().stages]


def test_paper_layout_is_cheaper_where_it_changes_something() -> None:
    original = {cost.name: cost for cost in stage_costs(original_spec(), (3, 2, 3))}
    flash = {cost.name: cost for cost in stage_costs(DECODER_SPECS["flash"], (3, 2, 3))}
    for name, cost in flash.items():
        if name in ("post_quant", "conv_in"):
            assert cost == original[name]
        else:
            assert cost.flop < original[name].flop
            assert cost.peak_activation_elements <= original[name].peak_activation_elements
