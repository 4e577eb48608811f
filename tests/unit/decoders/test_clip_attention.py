"""Attention over the frames of a clip, and upsamplers that repeat frames."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from flashvaed_cli.decoders.modules.blocks import Attention, Upsample
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.modules.convolution import time_window
from flashvaed_cli.decoders.predict.cost import stage_costs
from flashvaed_cli.decoders.spec.blocks import AttentionSpec, ConvBlockSpec, UpsampleSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec, StageSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec, NormSpec
from flashvaed_cli.export.graphs import traceable_copy


def point_conv(in_width: int, out_width: int) -> ConvSpec:
    return ConvSpec(operator="pointwise", in_width=in_width, out_width=out_width, kernel=(1, 1, 1))


def attention_spec(context: str = "clip") -> AttentionSpec:
    return AttentionSpec.model_validate({"width": 4, "inner_width": 6, "context": context})


def attending_decoder(context: str = "clip") -> Decoder:
    """A decoder of one layer and attention."""
    entry = ConvBlockSpec(conv=point_conv(4, 4))
    stage = StageSpec(name="mid", blocks=(entry, attention_spec(context)))
    decoder = Decoder(DecoderSpec(family="any", stages=(stage,), temporal_factor=1, spatial_factor=1))
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter)
    return decoder.double().requires_grad_(False)


def by_hand(block: Attention, x: Tensor) -> Tensor:
    """For each position, softmax over all positions of its frame and of earlier frames."""
    b, c, t, h, w = x.shape
    rows = block.norm(x).permute(0, 2, 3, 4, 1).reshape(b, t * h * w, c)
    q, k, v = block.qkv(rows).chunk(3, dim=-1)
    mixed = torch.empty_like(q)
    for position in range(t * h * w):
        seen = (position // (h * w) + 1) * h * w
        weights = torch.softmax(k[:, :seen] @ q[:, position, :, None] / q.shape[-1] ** 0.5, dim=1)
        mixed[:, position] = (weights * v[:, :seen]).sum(1)
    return x + block.proj(mixed).reshape(b, t, h, w, c).permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize("num_frames", [1, 4])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_position_sees_its_frame_and_all_before(num_frames: int, channels_last: bool) -> None:
    torch.manual_seed(0)
    decoder = attending_decoder()
    block = decoder.at("mid.1")
    assert isinstance(block, Attention)
    x = torch.randn(2, 4, num_frames, 2, 3, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last_3d) if channels_last else x
    torch.testing.assert_close(block(x), by_hand(block, x))
    traced = traceable_copy(decoder, torch.float64).at("mid.1")
    assert type(traced) is not Attention
    torch.testing.assert_close(traced(x), block(x))


def test_later_frames_change_nothing() -> None:
    block = attending_decoder().at("mid.1")
    x = torch.randn(1, 4, 3, 2, 2, dtype=torch.float64)
    changed = torch.cat([x[:, :, :2], torch.randn_like(x[:, :, :1])], dim=2)
    torch.testing.assert_close(block(changed)[:, :, :2], block(x)[:, :, :2])
    assert not torch.allclose(block(changed)[:, :, 2], block(x)[:, :, 2])


def test_gradients_are_those_by_hand() -> None:
    block = attending_decoder().at("mid.1")
    assert isinstance(block, Attention)
    x = torch.randn(1, 4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (block(x), by_hand(block, x))]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2), (1, 3), (3, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_state_is_all_earlier_keys_and_values(sizes: tuple[int, ...], channels_last: bool) -> None:
    block = attending_decoder().at("mid.1")
    x = torch.randn(2, 4, 4, 2, 3, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last_3d) if channels_last else x
    state: dict[str, Tensor] = {}
    parts = []
    for part in x.split(sizes, dim=2):
        before = {name: value.clone() for name, value in state.items()}
        past = dict(state) if parts else None
        parts.append(block(part, past, state))
        assert past is None or torch.equal(past["mid.1"], before["mid.1"])
    torch.testing.assert_close(torch.cat(parts, dim=2), block(x))
    assert state["mid.1"].shape == (2, 12, 4, 2, 3)


def test_a_decoder_with_it_streams_with_a_growing_state() -> None:
    clip, frame = attending_decoder().spec, attending_decoder("frame").spec
    assert (clip.is_causal, clip.sees_whole_clip, clip.grows_state) == (True, False, True)
    assert (frame.is_causal, frame.sees_whole_clip, frame.grows_state) == (True, False, False)
    normed = clip.with_blocks({"mid.1": normed_attention()})
    assert (normed.is_causal, normed.sees_whole_clip, normed.grows_state) == (False, True, False)
    assert "context" not in frame.model_dump_json() and '"context":"clip"' in clip.model_dump_json()
    assert DecoderSpec.model_validate_json(clip.model_dump_json()) == clip


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_products_are_counted_frame_by_frame(num_frames: int) -> None:
    """A frame's 6 positions attend to those of all frames up to its own: two products of 6 channels each."""
    grid = (num_frames, 2, 3)
    costs = [stage_costs(attending_decoder(context).spec, grid)[0].flop for context in ("clip", "frame")]
    pairs = 6 * 6 * sum(range(num_frames))  # beyond those in the same frame
    assert costs[0] - costs[1] == 2 * 2 * 6 * pairs


# --- frames that are repeated ------------------------------------------------------------------


def upsampler(**more: object) -> Upsample:
    conv = ConvSpec(
        operator="causal3d",
        in_width=3,
        out_width=2,
        kernel=(3, 3, 3),
        time_padding="first",
        space_padding="replicate",
    )
    block = Upsample(UpsampleSpec.model_validate({"spatial": conv, "repeats_frames": True, **more}), "up.0")
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    return block.double().requires_grad_(False)


def doubled_by_hand(x: Tensor) -> Tensor:
    t, h, w = x.shape[2:]
    frames = [(index + 1) // 2 for index in range(2 * t - 1)]
    return x[:, :, frames][:, :, :, [row // 2 for row in range(2 * h)]][..., [column // 2 for column in range(2 * w)]]


@pytest.mark.parametrize("num_frames", [1, 4])
def test_every_frame_but_the_first_comes_twice(num_frames: int) -> None:
    block = upsampler()
    x = torch.randn(2, 3, num_frames, 3, 2, dtype=torch.float64)
    window = F.pad(doubled_by_hand(x), (1, 1, 1, 1, 2, 0), mode="replicate")
    expected = F.conv3d(window, block.spatial.weight, block.spatial.bias)
    torch.testing.assert_close(block(x), expected)
    spec = UpsampleSpec(spatial=block.spatial.spec, repeats_frames=True)
    assert tuple(expected.shape[2:]) == spec.grid_after((num_frames, 3, 2)) and spec.growth == (2, 2, 2)


def test_chunks_follow_each_other() -> None:
    block, x = upsampler(), torch.randn(1, 3, 5, 2, 3, dtype=torch.float64)
    state: dict[str, Tensor] = {}
    parts = [block(x[:, :, :2], None, state), block(x[:, :, 2:3], state, state), block(x[:, :, 3:], state, None)]
    assert [part.shape[2] for part in parts] == [3, 2, 4]
    torch.testing.assert_close(torch.cat(parts, dim=2), block(x))


def test_frames_are_doubled_in_one_way() -> None:
    with pytest.raises(ValidationError, match="not by both"):
        upsampler(temporal=ConvSpec(operator="causal3d", in_width=3, out_width=6, kernel=(3, 1, 1)))


# --- what goes with it -------------------------------------------------------------------------


@pytest.mark.parametrize("time_padding", ["first", "edges", "zeros_around"])
def test_a_window_has_the_layout_of_its_clip(time_padding: str) -> None:
    conv = {"operator": "causal3d", "in_width": 8, "out_width": 8, "kernel": (3, 3, 3), "time_padding": time_padding}
    clip = torch.randn(1, 8, 4, 6, 6).contiguous(memory_format=torch.channels_last_3d)
    window = time_window(clip, ConvSpec.model_validate(conv), "here")
    assert window.shape[2] == 6 and window.is_contiguous(memory_format=torch.channels_last_3d)


def test_half_precision_follows_a_scaled_norm() -> None:
    """The norm before attention over a clip keeps the eps that a graph for float16 gives it."""
    decoder = Decoder(attending_decoder().spec.with_blocks({"mid.1": normed_attention()})).requires_grad_(False)
    fill_small(decoder)
    block = decoder.at("mid.1")
    assert isinstance(block, Attention)
    block.norm.eps = 0.25
    traced = traceable_copy(decoder, torch.float32).at("mid.1")
    x = torch.randn(1, 4, 2, 2, 2)
    torch.testing.assert_close(traced(x), block(x))


def normed_attention() -> AttentionSpec:
    return attention_spec().model_copy(update={"norm": NormSpec(eps=1e-6, shift=True, groups=2, over="clip")})


def fill_small(decoder: Decoder) -> None:
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter)
