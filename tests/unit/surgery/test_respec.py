from __future__ import annotations

import pytest

from flashvaed_cli.decoders.spec.blocks import AttentionSpec, HeadSpec, ResBlockSpec, UpsampleSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.groups import Kept, input_tensors
from flashvaed_cli.decoders.spec.operators import Operator
from flashvaed_cli.errors import SpecError
from flashvaed_cli.families.wan21.spec import WAN21
from flashvaed_cli.surgery.respec import converted_spec, narrowed_spec, with_time_rank
from tests.ltx_toy import ltx_spec
from tests.toy import DECODER_SPECS, kept_of, original_spec


def resblocks(spec: DecoderSpec) -> dict[str, ResBlockSpec]:
    return {address: block for address, block in spec.blocks() if isinstance(block, ResBlockSpec)}


def test_every_block_reads_the_one_before() -> None:
    inputs = input_tensors(original_spec())
    assert inputs["post_quant.0"] is None
    assert inputs["conv_in.0"] == "post_quant.0"
    assert inputs["up1.0"] == "up0.3" and inputs["head.0"] == "up3.2"


def test_narrowed_widths() -> None:
    spec = original_spec()
    narrowed = narrowed_spec(spec, kept_of(spec, ("up2", "up3")))
    widths = {address: (block.in_width, block.out_width) for address, block in narrowed.blocks()}
    assert widths["up1.2"] == (16, 16) and widths["up1.3"] == (16, 6)
    assert widths["up2.0"] == widths["up2.2"] == (6, 6) and widths["up2.3"] == (6, 3)
    assert widths["up3.0"] == (3, 3) and widths["head.0"] == (3, 3)
    assert all(block.conv1.out_width == 3 for address, block in resblocks(narrowed).items() if address[:3] == "up3")
    unchanged = {address for address, block in narrowed.blocks() if dict(spec.blocks())[address] == block}
    assert unchanged == {a for a, _ in spec.blocks() if a[:3] not in ("up2", "up3")} - {"up1.3", "head.0"}


def test_temporal_upsamplers_keep_two_halves() -> None:
    narrowed = narrowed_spec(original_spec(), kept_of(original_spec(), ("up0", "up1")))
    block = narrowed.stage("up0").blocks[3]
    assert isinstance(block, UpsampleSpec) and block.temporal is not None
    assert (block.temporal.in_width, block.temporal.out_width) == (12, 24)
    assert (block.spatial.in_width, block.spatial.out_width) == (12, 6)


def test_narrowed_streams_get_a_pointwise_shortcut() -> None:
    spec = original_spec()
    blocks = resblocks(narrowed_spec(spec, kept_of(spec, ("up2",))))
    for address, block in blocks.items():
        if address[:3] == "up2":
            assert block.shortcut is not None and block.shortcut.operator == "pointwise"
        else:
            assert block == resblocks(spec)[address]


def test_narrowed_insides_leave_the_identity() -> None:
    block = resblocks(narrowed_spec(original_spec(), {"up2.1.conv1": (0, 5)}))["up2.1"]
    assert block.shortcut is None
    assert block.conv1.out_width == block.conv2.in_width == 2
    assert block.conv1.in_width == block.conv2.out_width == 8


def test_narrowed_attention_keeps_its_inner_width() -> None:
    narrowed = narrowed_spec(original_spec(), kept_of(original_spec(), ("mid",)))
    assert narrowed.stage("mid").blocks[1] == AttentionSpec(width=12, inner_width=16)
    assert narrowed.stage("up0").blocks[0].in_width == 12
    assert resblocks(narrowed)["up0.0"].shortcut is not None


def test_operators_survive_narrowing() -> None:
    spec = DECODER_SPECS["converted"]
    narrowed = narrowed_spec(spec, kept_of(spec, ("up0", "up3")))
    assert [layer.operator for _, layer in spec.layers()] == [
        layer.operator for address, layer in narrowed.layers() if _in_both(address, spec)
    ]


def _in_both(address: str, spec: DecoderSpec) -> bool:
    return address in dict(spec.layers())


def test_keeping_nothing_special_changes_nothing() -> None:
    assert narrowed_spec(original_spec(), {}) == original_spec()


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"head.0": (0,)}, r"no prunable tensor 'head\.0'"),
        ({"post_quant.0": (0,)}, r"no prunable tensor 'post_quant\.0'"),
        ({"up2.9": (0,)}, r"no prunable tensor 'up2\.9'"),
        ({"up2.1.conv1": (0, 8)}, r"up2\.1\.conv1 has 8 channels, cannot keep \[0, 8\]"),
        ({"up2.1.conv1": (-1, 2)}, r"cannot keep \[-1, 2\]"),
        ({"up2.1.conv1": (2, 2)}, r"cannot keep \[2, 2\]"),
        ({"up2.1.conv1": ()}, r"cannot keep \[\]"),
    ],
)
def test_channels_that_do_not_exist(kept: Kept, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        narrowed_spec(original_spec(), kept)


def test_paper_layout() -> None:
    converted = converted_spec(original_spec(), WAN21.paper_operators)
    for address, block in resblocks(converted).items():
        stage = address.split(".")[0]
        operator = WAN21.paper_operators[stage]
        assert block.conv1.operator == block.conv2.operator == operator
        assert block.conv1.kernel == ((1, 3, 3) if operator == "frame2d" else (3, 3, 3))
        assert block.shortcut == resblocks(original_spec())[address].shortcut
    others = [block for _, block in converted.blocks() if not isinstance(block, ResBlockSpec)]
    assert others == [block for _, block in original_spec().blocks() if not isinstance(block, ResBlockSpec)]
    assert isinstance(others[-1], HeadSpec) and others[-1].conv.operator == "causal3d"


def test_converting_twice_is_converting_once() -> None:
    converted = DECODER_SPECS["converted"]
    assert converted_spec(converted, WAN21.paper_operators) == converted
    assert converted_spec(original_spec(), {}) == original_spec()


@pytest.mark.parametrize(
    ("stage", "operator", "message"),
    [
        ("up9", "frame2d", "no stage 'up9' in this decoder; it has post_quant, conv_in, mid, up0"),
        ("head", "frame2d", "stage 'head' has nothing to convert"),
        ("mid", "pointwise", r"mid\.0\.conv1 is causal3d: it converts to dwsep3d, frame2d, not to pointwise"),
    ],
)
def test_impossible_conversions(stage: str, operator: Operator, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        converted_spec(original_spec(), {stage: operator})


def test_taps_do_not_come_back() -> None:
    with pytest.raises(SpecError, match=r"up3\.0\.conv1 is frame2d: it converts to dwsep3d, not to causal3d"):
        converted_spec(DECODER_SPECS["converted"], {"up3": "causal3d"})
    layers = dict(converted_spec(DECODER_SPECS["converted"], {"up3": "dwsep3d"}).layers())
    assert layers["up3.0.conv1"].kernel == (1, 3, 3)


def test_a_decoder_that_doubles_frames_in_another_way_is_told_so() -> None:
    with pytest.raises(SpecError, match=r"by shuffling channels of up1\.0, up2\.1, up3\.1 into time and space at once"):
        with_time_rank(ltx_spec(), 0.25)
    spec = original_spec()
    without = spec.with_blocks({address: UpsampleSpec(spatial=block.spatial) for address, block in upsamplers(spec)})
    with pytest.raises(SpecError, match="this decoder has no temporal upsampler: leave --time-rank out"):
        with_time_rank(without, 0.25)


def upsamplers(spec: DecoderSpec) -> list[tuple[str, UpsampleSpec]]:
    return [(address, block) for address, block in spec.blocks() if isinstance(block, UpsampleSpec)]
