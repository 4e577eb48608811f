"""Resamplers with copies of their input, against sums over channels and positions written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from flashvaed_cli.decoders.modules.cell_blocks import CellDownsample, CellUpsample
from flashvaed_cli.decoders.predict.lookahead import time_halo
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.decoders.spec.blocks import CellDownsampleSpec, CellUpsampleSpec
from flashvaed_cli.decoders.spec.convolutions import point_conv
from flashvaed_cli.decoders.spec.groups import channel_groups, consumers, producers
from flashvaed_cli.decoders.spec.layers import Factor
from flashvaed_cli.decoders.variants.half_range import fit_half_range
from flashvaed_cli.families.hunyuanvideo.spec import hunyuan_conv
from flashvaed_cli.surgery.respec import narrowed_spec
from tests.hunyuan15_toy import hunyuan15_spec
from tests.toy import kept_of, toy_decoder, toy_latents

BOTH, SIZE = (2, 2, 2), (1, 2, 2)


def filled(block: nn.Module) -> Any:
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    return block.double().requires_grad_(False)


def upsampler(in_width: int, out_width: int, factor: Factor, **more: Any) -> CellUpsample:
    wide = out_width * factor[0] * factor[1] * factor[2]
    return filled(CellUpsample(CellUpsampleSpec(conv=hunyuan_conv(in_width, wide), factor=factor, **more), "up.0"))


def downsampler(in_width: int, out_width: int, factor: Factor) -> CellDownsample:
    narrow = out_width // (factor[0] * factor[1] * factor[2])
    return filled(CellDownsample(CellDownsampleSpec(conv=hunyuan_conv(in_width, narrow), factor=factor), "down.0"))


def enlarged_by_hand(block: CellUpsample, x: Tensor) -> Tensor:
    """Position by position: in later frames cells of ft x fh x fw, in the first one of fh x fw, ft positions apart."""
    ft, fh, fw = block.spec.factor
    wide, width = block.conv(x), block.spec.out_width
    b, c, t, h, w = x.shape
    y = x.new_zeros(b, width, 1 + ft * (t - 1), fh * h, fw * w)
    for frame in range(t):
        num_times = 1 if frame == 0 else ft
        num_positions = num_times * fh * fw
        run = c // num_positions  # channels of the input that go to one position
        for k in range(num_times):
            for i in range(fh):
                for j in range(fw):
                    position = (k * fh + i) * fw + j
                    at = 0 if frame == 0 else 1 + ft * (frame - 1) + k
                    for channel in range(width):
                        row = channel * ft * fh * fw + (ft * position if frame == 0 else position)
                        value = wide[:, row, frame]
                        if block.spec.residual:
                            value = value + x[:, position * run + channel * run // width, frame]
                        if block.first is not None and frame == 0:
                            value = value + block.first(x[:, :, :1])[:, channel * fh * fw + position, 0]
                        y[:, channel, at, i::fh, j::fw] = value
    return y


@pytest.mark.parametrize("num_frames", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("in_width", "out_width", "factor"), [(8, 8, BOTH), (16, 8, BOTH), (8, 4, SIZE), (4, 4, SIZE), (8, 2, SIZE)]
)
def test_enlarging(in_width: int, out_width: int, factor: Factor, channels_last: bool, num_frames: int) -> None:
    block = upsampler(in_width, out_width, factor)
    x = torch.randn(2, in_width, num_frames, 2, 3, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last_3d) if channels_last else x
    expected = enlarged_by_hand(block, x)
    torch.testing.assert_close(block(x), expected)
    assert tuple(expected.shape[2:]) == block.spec.grid_after((num_frames, 2, 3))
    with torch.enable_grad():
        torch.testing.assert_close(block(x), expected)  # there the sum is a new tensor


@pytest.mark.parametrize("num_frames", [1, 3])
def test_first_frames_may_have_a_layer(num_frames: int) -> None:
    block = upsampler(5, 3, BOTH, residual=False, first=point_conv(5, 12))
    x = torch.randn(1, 5, num_frames, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(block(x), enlarged_by_hand(block, x))


def shrunk_by_hand(block: CellDownsample, x: Tensor) -> Tensor:
    """Channel by channel: all channels of one position, then those of the next; runs of them are averaged."""
    ft, fh, fw = block.spec.factor
    y, width = block.conv(x), block.spec.out_width
    b, _, t, h, w = x.shape
    result = x.new_zeros(b, width, 1 + (t - 1) // ft, h // fh, w // fw)
    for frame in range(result.shape[2]):
        times = [0] if frame == 0 else [1 + ft * (frame - 1) + k for k in range(ft)]
        cells = [(k, i, j) for k in times for i in range(fh) for j in range(fw)]
        moved = torch.cat([y[:, :, k, i::fh, j::fw] for k, i, j in cells], dim=1)
        own = torch.cat([x[:, :, k, i::fh, j::fw] for k, i, j in cells], dim=1)
        for channel in range(width):
            run = own.shape[1] // width
            mean = own[:, channel * run : (channel + 1) * run].mean(dim=1)
            result[:, channel, frame] = moved[:, channel % moved.shape[1]] + mean
    return result


@pytest.mark.parametrize("num_frames", [1, 5])
@pytest.mark.parametrize(("in_width", "out_width", "factor"), [(8, 8, BOTH), (4, 8, BOTH), (4, 8, SIZE), (8, 4, SIZE)])
def test_shrinking(in_width: int, out_width: int, factor: Factor, num_frames: int) -> None:
    block = downsampler(in_width, out_width, factor)
    x = torch.randn(2, in_width, num_frames, 4, 6, dtype=torch.float64)
    expected = shrunk_by_hand(block, x)
    torch.testing.assert_close(block(x), expected)
    assert tuple(expected.shape[2:]) == block.spec.grid_after((num_frames, 4, 6))


def test_chunks_follow_each_other() -> None:
    grow, shrink = upsampler(8, 4, BOTH), downsampler(4, 8, BOTH)
    x = torch.randn(1, 8, 5, 2, 2, dtype=torch.float64)
    clip = torch.randn(1, 4, 9, 4, 4, dtype=torch.float64)
    for block, whole, sizes in ((grow, x, (2, 1, 2)), (shrink, clip, (1, 4, 2, 2))):
        state: dict[str, Tensor] = {}
        parts: list[Tensor] = []
        for part in whole.split(sizes, dim=2):
            parts.append(block(part, state if parts else None, state))
        torch.testing.assert_close(torch.cat(parts, dim=2), block(whole))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"conv": hunyuan_conv(8, 12)}, "12 channels do not make cells of 8"),
        ({"conv": hunyuan_conv(12, 16)}, "a residual cannot join 12 channels to 2"),
        ({"conv": hunyuan_conv(16, 16)}, "a residual cannot join 16 channels to 2"),
        ({"first": point_conv(8, 32)}, "without a residual"),
        ({"residual": False, "first": point_conv(8, 16)}, "pointwise, 8 to 32 channels"),
        ({"residual": False, "factor": SIZE, "first": point_conv(8, 64)}, "only where frames grow in time"),
    ],
)
def test_specs_that_make_no_sense(changed: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CellUpsampleSpec.model_validate({"conv": hunyuan_conv(8, 64), "factor": BOTH, **changed})
    with pytest.raises(ValidationError, match="cannot be averaged"):
        CellDownsampleSpec(conv=hunyuan_conv(2, 3), factor=BOTH)


def test_what_the_spec_says() -> None:
    spec = hunyuan15_spec()
    groups = {group.name: group for group in channel_groups(spec)}
    assert {name for name in groups if "inner" not in name} == {f"{at}.stream" for at in ("mid", *UPS)}
    assert groups["up1.stream"].tensors == ("up0.3", "up1.0", "up1.1", "up1.2")
    assert producers(spec, groups["up1.stream"])[0] == "up0.3.conv"
    assert [reader.layer for reader in consumers(spec, groups["up1.stream"])][-2:] == ["up1.3.conv", None]
    assert (spec.is_causal, spec.grows_state, time_halo(spec)[1]) == (True, True, 0)
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec


def test_what_the_spec_of_a_layer_for_first_frames_says() -> None:
    block = hunyuan15_spec().stage("up0").blocks[3]
    assert isinstance(block, CellUpsampleSpec)
    first = point_conv(block.conv.in_width, block.conv.out_width // 2)
    block = CellUpsampleSpec(conv=block.conv, factor=block.factor, residual=False, first=first)
    assert block.layer_grid("first", (3, 4, 5)) == (1, 4, 5) and block.layer_grid("conv", (3, 4, 5)) == (3, 4, 5)
    spec = hunyuan15_spec().with_blocks({"up0.3": block})
    groups = {group.name: group for group in channel_groups(spec)}
    assert producers(spec, groups["up1.stream"])[:2] == ["up0.3.conv", "up0.3.first"]
    assert [reader.layer for reader in consumers(spec, groups["up0.stream"])][-2:] == ["up0.3.conv", "up0.3.first"]


UPS = tuple(f"up{i}" for i in range(5))


def test_a_stream_of_copied_latents_is_not_scaled_for_half_precision() -> None:
    """Nothing before it could be; the frames stay the same."""
    decoder, latents = toy_decoder(hunyuan15_spec()), toy_latents(2)
    decoder.get_parameter("stages.conv_in.0.conv.weight").mul_(2.0**14)
    expected = decode(decoder, latents)
    assert "stream" not in fit_half_range(decoder)
    torch.testing.assert_close(decode(decoder, latents), expected, rtol=0, atol=1e-4)


def test_a_stream_that_begins_with_layers_is_scaled_for_half_precision() -> None:
    """A narrowed bypass has a layer in place of copies, which is scaled like the convolution beside it."""
    whole = hunyuan15_spec()
    decoder, latents = toy_decoder(narrowed_spec(whole, kept_of(whole, ("mid", *UPS)))), toy_latents(2)
    for layer in (decoder.at("conv_in.0.conv"), decoder.at("conv_in.0.bypass")):
        layer.get_parameter("weight").mul_(2.0**14)
    expected = decode(decoder, latents)
    assert fit_half_range(decoder)["stream"] < -8
    torch.testing.assert_close(decode(decoder, latents), expected, rtol=0, atol=1e-4)
