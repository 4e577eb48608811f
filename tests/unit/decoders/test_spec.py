from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from flashvaed_cli.decoders.spec.blocks import AttentionSpec, ConvBlockSpec, HeadSpec, ResBlockSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec, EncoderSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec
from flashvaed_cli.decoders.spec.operators import Operator
from flashvaed_cli.families.wan21.spec import wan_decoder_spec, wan_encoder_spec
from tests.toy import BASE_WIDTH, DECODER_SPECS, original_spec


def conv(in_width: int, out_width: int, operator: Operator = "causal3d") -> ConvSpec:
    kernel = {"pointwise": (1, 1, 1), "frame2d": (1, 3, 3)}.get(operator, (3, 3, 3))
    return ConvSpec(operator=operator, in_width=in_width, out_width=out_width, kernel=kernel)


@pytest.mark.parametrize(
    ("operator", "kernel", "message"),
    [
        ("pointwise", (1, 3, 3), r"pointwise layer has kernel \(1, 1, 1\), not \(1, 3, 3\)"),
        ("frame2d", (3, 3, 3), r"frame2d layer has one temporal tap, not kernel \(3, 3, 3\)"),
        ("dense", (3, 3, 3), r"operator"),
    ],
)
def test_kernels_that_do_not_fit_the_operator(operator: Operator, kernel: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ConvSpec(operator=operator, in_width=2, out_width=2, kernel=kernel)


@pytest.mark.parametrize(
    ("operator", "changed", "message"),
    [
        ("depthwise3d", {"out_width": 3}, "gives the 2 channels it takes, not 3"),
        ("lowrank3d", {"rank": 1}, "one tap in space and pads zeros in time"),
        ("lowrank3d", {"kernel": (3, 1, 1)}, "rank None in a lowrank3d layer"),
        ("causal3d", {"rank": 1}, "rank 1 in a causal3d layer"),
        ("winograd3d", {"kernel": (3, 1, 1)}, r"3x3 taps in space, not kernel \(3, 1, 1\)"),
        ("stacked3d", {"time_padding": "edges"}, "causal in time, not padded with edges"),
        ("subpixel2d", {}, "one temporal tap"),
        ("subpixel2d", {"kernel": (1, 1, 1)}, "3x3 taps"),
        ("subpixel2d", {"kernel": (1, 3, 3), "space_padding": "reflect"}, "pads zeros around frames, not reflect"),
    ],
)
def test_each_operator_says_what_keeps_a_layer_from_it(
    operator: Operator, changed: dict[str, object], message: str
) -> None:
    fields = {"operator": operator, "in_width": 2, "out_width": 2, "kernel": (3, 3, 3), **changed}
    with pytest.raises(ValidationError, match=message):
        ConvSpec.model_validate(fields)


def test_widths_and_keys_are_checked() -> None:
    with pytest.raises(ValidationError, match="in_width"):
        conv(0, 2)
    with pytest.raises(ValidationError, match="stride"):
        ConvSpec.model_validate({**conv(1, 1).model_dump(), "stride": 2})


def test_residual_block_chains() -> None:
    with pytest.raises(ValidationError, match="conv1 gives 6 channels, conv2 takes 5"):
        ResBlockSpec(conv1=conv(4, 6), conv2=conv(5, 4))
    with pytest.raises(ValidationError, match="identity shortcut cannot join 4 channels to 5"):
        ResBlockSpec(conv1=conv(4, 6), conv2=conv(6, 5))
    ResBlockSpec(conv1=conv(4, 6), conv2=conv(6, 5), shortcut=conv(4, 5, "pointwise"))


def test_blocks_chain() -> None:
    with pytest.raises(ValidationError, match=r"up3\.2 gives 4 channels, head\.0 takes 5"):
        original_spec().with_blocks({"head.0": HeadSpec(conv=conv(5, 3))})


def test_with_blocks_replaces_only_what_is_named() -> None:
    spec = original_spec()
    changed = spec.with_blocks({"mid.1": AttentionSpec(width=16, inner_width=3)})
    assert type(changed) is DecoderSpec
    differing = [a for (a, old), (_, new) in zip(spec.blocks(), changed.blocks(), strict=True) if old != new]
    assert differing == ["mid.1"]
    assert changed.with_blocks({"mid.1": spec.stage("mid").blocks[1]}) == spec


@pytest.mark.parametrize("name", DECODER_SPECS)
def test_json_round_trip(name: str) -> None:
    spec = DECODER_SPECS[name]
    assert DecoderSpec.model_validate_json(spec.model_dump_json()) == spec


def test_encoder_json_round_trip() -> None:
    spec = wan_encoder_spec(BASE_WIDTH)
    assert EncoderSpec.model_validate_json(spec.model_dump_json()) == spec
    with pytest.raises(ValidationError, match="role"):
        DecoderSpec.model_validate_json(spec.model_dump_json())


def test_released_widths() -> None:
    spec = wan_decoder_spec(96)
    assert spec.latent_width == 16
    assert [stage.blocks[-1].out_width for stage in spec.stages] == [16, 384, 384, 192, 192, 96, 96, 3]
    assert [stage.blocks[0].in_width for stage in spec.stages] == [16, 16, 384, 384, 192, 192, 96, 96]


def test_addresses_in_forward_order() -> None:
    spec = original_spec()
    layers = [address for address, _ in spec.layers()]
    assert layers[:4] == ["post_quant.0.conv", "conv_in.0.conv", "mid.0.conv1", "mid.0.conv2"]
    assert "up1.0.shortcut" in layers and "up2.0.shortcut" not in layers
    assert list(spec.stage("up0").blocks[3].layers) == ["temporal", "spatial"]
    assert list(wan_encoder_spec(BASE_WIDTH).stage("down1").blocks[2].layers) == ["spatial", "temporal"]
    with pytest.raises(KeyError, match="up9"):
        spec.stage("up9")


def test_specs_are_frozen() -> None:
    block = ConvBlockSpec(conv=conv(2, 2))
    with pytest.raises(ValidationError, match="frozen"):
        block.conv = conv(2, 3)  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_specs_imports_no_torch() -> None:
    program = "import sys, flashvaed_cli.decoders.spec.coders; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
