"""GroupNorm over frames: the module, its spec, and its effect on tiles, costs and channel groups."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.modules.memory_format import channels_last
from flashvaed_cli.decoders.modules.norms import FrameGroupNorm, norm_silu
from flashvaed_cli.decoders.predict.cost import stage_costs
from flashvaed_cli.decoders.predict.memory import predict_peak_bytes
from flashvaed_cli.decoders.predict.planning import choose_plan
from flashvaed_cli.decoders.predict.tiling import split_addresses
from flashvaed_cli.decoders.spec.blocks import AttentionSpec, HeadSpec, ResBlockSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.groups import channel_groups
from flashvaed_cli.decoders.spec.layers import ConvSpec, NormSpec
from flashvaed_cli.errors import SpecError
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.surgery.respec import narrowed_spec
from tests.toy import kept_of, toy_decoder

SPEC = get_family("sdxl").decoder_spec(8, 4)
NORM = NormSpec(eps=1e-2, shift=True, groups=3)


def drawn(norm: FrameGroupNorm) -> FrameGroupNorm:
    assert norm.gamma is not None and norm.beta is not None
    torch.manual_seed(0)
    with torch.no_grad():
        norm.gamma.uniform_(0.5, 1.5)
        norm.beta.normal_()
    return norm.eval().requires_grad_(False)


def by_hand(norm: FrameGroupNorm, x: Tensor) -> Tensor:
    """Group by group and frame by frame, in float64."""
    y = torch.empty_like(x, dtype=torch.float64)
    size = x.shape[1] // norm.groups
    for clip in range(x.shape[0]):
        for frame in range(x.shape[2]):
            for start in range(0, x.shape[1], size):
                part = x[clip, start : start + size, frame].double()
                unit = (part - part.mean()) / (part.var(unbiased=False) + norm.eps).sqrt()
                y[clip, start : start + size, frame] = unit
    assert norm.gamma is not None and norm.beta is not None
    return y * norm.gamma.double().view(-1, 1, 1, 1) + norm.beta.double().view(-1, 1, 1, 1)


@pytest.mark.parametrize("num_frames", [1, 3])
@pytest.mark.parametrize("is_channels_last", [False, True])
def test_against_sums_by_hand(num_frames: int, is_channels_last: bool) -> None:
    norm, x = drawn(FrameGroupNorm(6, NORM)), 3 * torch.randn(2, 6, num_frames, 4, 5) + 1
    given = channels_last(x) if is_channels_last else x
    expected = by_hand(norm, x)
    torch.testing.assert_close(norm(given).double(), expected, rtol=1e-5, atol=1e-5)
    kept = given.clone()
    silu = torch.nn.functional.silu(expected)
    torch.testing.assert_close(norm_silu(norm, given).double(), silu, rtol=1e-5, atol=1e-5)
    assert torch.equal(given, kept)  # the activation overwrites the norm's output alone


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_statistics_in_float32(dtype: torch.dtype) -> None:
    norm, x = drawn(FrameGroupNorm(6, NORM)), 300 * torch.randn(1, 6, 2, 8, 8)  # squares that float16 cannot hold
    found = norm.to(dtype)(x.to(dtype)).double()
    expected = by_hand(norm.float(), x.to(dtype).float())
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * torch.finfo(dtype).eps * float(expected.abs().max()))


def test_a_group_is_a_whole_number_of_channels() -> None:
    with pytest.raises(SpecError, match="cannot part 8 channels into 3 equal groups"):
        FrameGroupNorm(8, NORM)
    with pytest.raises(ValueError, match="needs an eps"):
        NormSpec(groups=3)
    conv = ConvSpec(operator="frame2d", in_width=8, out_width=3, kernel=(1, 3, 3))
    assert HeadSpec(conv=conv, norm=NORM).group_fault == "norm cannot part 8 channels into 3 equal groups"
    with pytest.raises(ValueError, match="keeps whole groups, not 3 of 6 channels"):
        NORM.narrowed(6, 3)
    assert NORM.narrowed(6, 4).groups == 2


def test_specs_without_groups_say_nothing_of_them() -> None:
    """Specs without GroupNorm stay readable for versions that do not know it; specs with it round-trip."""
    spec = get_family("wan2.1").decoder_spec(4, 4)
    text = json.dumps(spec.model_dump())
    assert "groups" not in text and "norm2" not in text
    attention = next(block for _, block in spec.blocks() if isinstance(block, AttentionSpec))
    assert attention.model_dump() == {"kind": "attention", "width": 16, "inner_width": 16}
    narrow = narrowed_spec(SPEC, kept_of(SPEC, ("mid", "up3")))
    assert "norm2" in json.dumps(narrow.model_dump())
    for one in (spec, SPEC, narrow):
        assert DecoderSpec.model_validate(json.loads(json.dumps(one.model_dump()))) == one


def test_runs_of_channels_are_those_that_every_norm_takes_as_one() -> None:
    runs = {group.name: (group.width, group.run) for group in channel_groups(SPEC)}
    assert runs["up3.stream"] == (8, 1) and runs["up2.stream"] == (16, 2) and runs["up2.entry"] == (32, 4)
    assert runs["up3.0.inner"] == (8, 1) and runs["mid.stream"] == (32, 4)
    assert all(group.run == 1 for group in channel_groups(get_family("wan2.1").decoder_spec(4, 4)))


def test_kept_channels_are_whole_groups() -> None:
    with pytest.raises(SpecError, match=r"groups of 2 channels, which stay or go together; cannot keep \[0, 1, 2\]"):
        narrowed_spec(SPEC, {"up2.0.conv1": (0, 1, 2)})
    with pytest.raises(SpecError, match="stay or go together"):
        narrowed_spec(SPEC, {"up2.0.conv1": (1, 2)})
    block = narrowed_spec(SPEC, {"up2.0.conv1": (2, 3, 8, 9)}).stage("up2").blocks[0]
    assert isinstance(block, ResBlockSpec) and block.norm2 is not None
    assert (block.norm.groups, block.norm2.groups) == (8, 2)


@torch.no_grad()
def test_groups_that_stay_give_what_they_gave() -> None:
    norm, kept = drawn(FrameGroupNorm(6, NORM)), [0, 1, 4, 5]
    narrow = FrameGroupNorm(4, NORM.narrowed(6, 4))
    assert norm.gamma is not None and narrow.gamma is not None and norm.beta is not None and narrow.beta is not None
    narrow.gamma.copy_(norm.gamma[kept])
    narrow.beta.copy_(norm.beta[kept])
    x = torch.randn(2, 6, 3, 4, 5)
    assert torch.equal(narrow(x[:, kept]), norm(x)[:, kept])


def test_whole_frames_alone() -> None:
    assert split_addresses(SPEC) == ()
    for refused in (
        lambda: choose_plan(SPEC, (3, 8, 8), tile=4),
        lambda: predict_peak_bytes(SPEC, (3, 8, 8), tile=4),
    ):
        with pytest.raises(SpecError, match=r"no tiles: head.0 \(head\) takes the statistics of its GroupNorm"):
            refused()
    limit = predict_peak_bytes(SPEC, (64, 32, 32), chunk=2)
    plan = choose_plan(SPEC, (64, 32, 32), max_memory_bytes=limit)
    assert plan.tile is None and 2 <= plan.chunk < 64 and plan.predicted_bytes <= limit


@pytest.mark.parametrize("stages", [(), ("up2", "up3"), ("mid", "up0", "up1", "up2", "up3")])
def test_parameters_are_counted(stages: tuple[str, ...]) -> None:
    spec = narrowed_spec(SPEC, kept_of(SPEC, stages))
    assert sum(stage.parameters for stage in stage_costs(spec, (1, 2, 2))) == Decoder(spec).parameter_count


def test_frames_are_independent() -> None:
    decoder, latents = toy_decoder(SPEC), torch.randn(1, 4, 3, 4, 5)
    with torch.no_grad():
        whole = decoder(latents)
        alone = torch.cat([decoder(frame) for frame in latents.split(1, dim=2)], dim=2)
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-5)
