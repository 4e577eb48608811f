"""Every operator and block against plain torch, in float64: equal up to rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from flashvaed_cli.decoders.modules.blocks import Downsample, Upsample
from flashvaed_cli.decoders.modules.operators import (
    OPERATORS,
    CausalConv3d,
    ChannelRMSNorm,
    Conv,
    FrameConv2d,
    LowRankConv3d,
    Pointwise,
    SeparableConv3d,
    batch_as_frames,
    build_conv,
    frames_as_batch,
    norm_silu,
)
from flashvaed_cli.decoders.spec.blocks import DownsampleSpec, UpsampleSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec, Kernel
from flashvaed_cli.decoders.spec.operators import Operator

KERNELS: dict[Operator, Kernel] = {
    "causal3d": (3, 3, 3),
    "dwsep3d": (3, 3, 3),
    "frame2d": (1, 3, 3),
    "pointwise": (1, 1, 1),
    "lowrank3d": (3, 1, 1),
    "tapwise3d": (3, 3, 3),
    "stacked3d": (3, 3, 3),
    "winograd3d": (3, 3, 3),
    "subpixel2d": (1, 3, 3),
    "depthwise3d": (3, 3, 3),
}
ROUNDING = 1e-12


def layer(operator: Operator, in_width: int = 3, out_width: int = 5, kernel: Kernel | None = None) -> Conv:
    rank = 2 if operator == "lowrank3d" else None
    kernel = kernel or KERNELS[operator]
    out_width = in_width if operator == "depthwise3d" else out_width
    spec = ConvSpec(operator=operator, in_width=in_width, out_width=out_width, kernel=kernel, rank=rank)
    built = build_conv(spec, "here.0.conv").double().requires_grad_(False)
    built.bias.normal_()
    return built


def clip(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (1, 3, 3), (2, 5, 1)])
def test_causal3d_is_a_conv_padded_at_the_front(kernel: Kernel) -> None:
    conv, x = layer("causal3d", kernel=kernel), clip(2, 3, 4, 5, 6)
    kt, kh, kw = kernel
    oracle = nn.Conv3d(3, 5, kernel, padding=(kt - 1, kh // 2, kw // 2)).double().requires_grad_(False)
    oracle.weight.copy_(conv.weight)
    assert oracle.bias is not None
    oracle.bias.copy_(conv.bias)
    assert isinstance(conv, CausalConv3d)
    assert_same(conv(x), oracle(x)[:, :, :4])


def test_separable_equals_the_dense_composed_kernel() -> None:
    separable, dense, x = layer("dwsep3d"), layer("causal3d"), clip(2, 3, 4, 5, 6)
    assert isinstance(separable, SeparableConv3d)
    dense.weight.copy_(torch.einsum("oc,cthw->octhw", separable.weight, separable.depthwise[:, 0]))
    dense.bias.copy_(separable.bias)
    assert_same(separable(x), dense(x))


def test_low_rank_equals_the_dense_product() -> None:
    low, dense, x = layer("lowrank3d"), layer("causal3d", kernel=(3, 1, 1)), clip(2, 3, 4, 5, 6)
    assert isinstance(low, LowRankConv3d)
    dense.weight.copy_(torch.einsum("or,rcthw->octhw", low.weight, low.reduce))
    dense.bias.copy_(low.bias)
    assert_same(low(x), dense(x))
    assert torch.equal(low.dense_kernel().reshape(dense.weight.shape), dense.weight)
    assert low.spec.parameter_count == sum(p.numel() for p in low.parameters())


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_stands_for_a_dense_kernel(operator: Operator) -> None:
    """Which a dense layer computes as well, and which, written back, leaves the layer's output as it was."""
    found, x = layer(operator), clip(1, 3, 4, 6, 8)
    dense = layer("causal3d", found.spec.in_width, found.spec.out_width, KERNELS[operator])
    dense.weight.copy_(found.dense_kernel())
    dense.bias.copy_(found.bias)
    expected = dense(Upsample.enlarge(x) if found.spec.enlarges else x)
    assert_same(found(x), expected)
    found.set_dense_kernel_(found.dense_kernel().clone())
    assert_same(found(x), expected)


@pytest.mark.parametrize("operator", OPERATORS)
def test_axes_and_number_are_those_of_the_parameters(operator: Operator) -> None:
    found = layer(operator)
    assert set(found.channel_axes) == {name for name, _ in found.named_parameters()}
    assert found.spec.parameter_count == sum(parameter.numel() for parameter in found.parameters())
    for name, (out_axis, in_axis) in found.channel_axes.items():
        shape = found.get_parameter(name).shape
        assert out_axis is None or shape[out_axis] == found.spec.out_width
        assert in_axis is None or shape[in_axis] == found.spec.in_width


def test_frame2d_equals_causal3d_with_only_the_last_tap() -> None:
    frame, dense, x = layer("frame2d"), layer("causal3d"), clip(2, 3, 4, 5, 6)
    assert isinstance(frame, FrameConv2d)
    dense.weight.zero_()
    dense.weight[:, :, -1].copy_(frame.weight)
    dense.bias.copy_(frame.bias)
    assert_same(frame(x), dense(x))


def test_pointwise_mixes_channels() -> None:
    point, x = layer("pointwise"), clip(2, 3, 4, 5, 6)
    assert isinstance(point, Pointwise)
    expected = torch.einsum("oc,bcthw->bothw", point.weight, x) + point.bias[None, :, None, None, None]
    assert_same(point(x), expected)


@given(operator=st.sampled_from(list(OPERATORS)), num_frames=st.integers(1, 6), data=st.data())
def test_no_frame_depends_on_a_later_one(operator: Operator, num_frames: int, data: st.DataObject) -> None:
    changed = data.draw(st.integers(0, num_frames - 1))
    conv, x = layer(operator), clip(1, 3, num_frames, 3, 3)
    other = x.clone()
    other[:, :, changed] += 1.0
    same = (conv(x) == conv(other)).flatten(3).all(3).flatten(0, 1).all(0)
    assert bool(same[:changed].all())
    assert not bool(same[changed])
    past = KERNELS[operator][0] - 1
    assert bool(same[changed + past + 1 :].all())


@pytest.mark.parametrize("operator", OPERATORS)
def test_only_temporal_operators_keep_state(operator: Operator) -> None:
    future: dict[str, Tensor] = {}
    x = clip(1, 3, 5, 4, 4)
    layer(operator)(x, None, future)
    if KERNELS[operator][0] == 1:
        assert future == {}
    else:
        assert list(future) == ["here.0.conv"]
        kept = future["here.0.conv"]
        assert_same(kept, x[:, :, -2:])
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()  # no view of the chunk


def test_frames_as_batch_and_back() -> None:
    x = clip(2, 3, 4, 5, 6)
    frames = frames_as_batch(x)
    assert torch.equal(frames[4 + 2], x[1, :, 2])
    assert torch.equal(batch_as_frames(frames, x), x)


def test_norm_divides_by_the_root_mean_square() -> None:
    norm, x = ChannelRMSNorm(6).double().requires_grad_(False), clip(2, 6, 3, 4, 4)
    gamma = norm.get_parameter("gamma").normal_()
    gamma = gamma[None, :, None, None, None]
    assert_same(norm(x), x / x.square().mean(dim=1, keepdim=True).sqrt() * gamma)
    assert bool(torch.isfinite(norm(torch.zeros_like(x))).all())


def test_norm_of_half_precision_does_not_overflow() -> None:
    norm = ChannelRMSNorm(4).half()
    x = torch.full((1, 4, 1, 1, 1), 3e4, dtype=torch.float16)  # its square is beyond half precision
    y = norm(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, torch.ones_like(y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_norm_is_the_same_without_gradients(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    norm, x = ChannelRMSNorm(6).to(dtype), torch.randn(2, 6, 3, 4, 5).to(dtype).contiguous(memory_format=memory_format)
    norm.get_parameter("gamma").data.uniform_(0.5, 1.5)
    x[:, :, 0, 0] = 0.0
    before, expected = x.clone(), F.silu(norm(x))
    with torch.no_grad():
        found = norm_silu(norm, x)
    bound = 4 * torch.finfo(dtype).eps  # roundings of a value of up to 4
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=4 * bound)
    assert found.dtype == dtype and torch.equal(x, before)


def temporal_spec(in_width: int, out_width: int) -> ConvSpec:
    return ConvSpec(operator="causal3d", in_width=in_width, out_width=out_width, kernel=(3, 1, 1))


def frame_spec(in_width: int, out_width: int) -> ConvSpec:
    return ConvSpec(operator="frame2d", in_width=in_width, out_width=out_width, kernel=(1, 3, 3))


@pytest.mark.parametrize("num_frames", [1, 2, 4])
def test_upsample_doubles_all_frames_but_the_first(num_frames: int) -> None:
    spec = UpsampleSpec(temporal=temporal_spec(4, 8), spatial=frame_spec(4, 2))
    block = Upsample(spec, "up0.3").double().requires_grad_(False)
    assert block.temporal is not None
    x = clip(2, 4, num_frames, 3, 5)
    doubled = [x[:, :, 0]]
    rest = block.temporal(x[:, :, 1:]) if num_frames > 1 else None
    for t in range(num_frames - 1):
        assert rest is not None
        doubled += [rest[:, :4, t], rest[:, 4:, t]]
    oracle = [
        F.conv2d(F.interpolate(frame, scale_factor=2), block.spatial.weight, block.spatial.bias, padding=1)
        for frame in doubled
    ]
    assert_same(block(x), torch.stack(oracle, dim=2))


@pytest.mark.parametrize("num_frames", [1, 3, 5])
def test_downsample_halves_all_frames_but_the_first(num_frames: int) -> None:
    spec = DownsampleSpec(spatial=frame_spec(4, 4), temporal=temporal_spec(4, 4))
    block = Downsample(spec, "down1.2").double().requires_grad_(False)
    assert block.temporal is not None
    x = clip(2, 4, num_frames, 6, 8)
    small = torch.stack(
        [
            F.conv2d(F.pad(frame, (0, 1, 0, 1)), block.spatial.weight, block.spatial.bias, stride=2)
            for frame in x.unbind(2)
        ],
        dim=2,
    )
    frames = [small[:, :, 0]]
    for t in range(2, num_frames, 2):
        window = small[:, :, t - 2 : t + 1]
        frames.append(F.conv3d(window, block.temporal.weight, block.temporal.bias)[:, :, 0])
    assert_same(block(x), torch.stack(frames, dim=2))
