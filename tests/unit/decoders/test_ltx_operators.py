"""Operators as LTX needs them: padding as data, exact twins, tiles, costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flashvaed_cli.calibrate.width_latency import _grid
from flashvaed_cli.decoders.modules import winograd
from flashvaed_cli.decoders.modules.convolution import Conv
from flashvaed_cli.decoders.modules.norms import ChannelLayerNorm, ChannelRMSNorm
from flashvaed_cli.decoders.modules.operators import build_conv
from flashvaed_cli.decoders.modules.shuffle_blocks import cells_to_channels, channels_to_cells
from flashvaed_cli.decoders.predict import planning
from flashvaed_cli.decoders.predict.cost import stage_costs
from flashvaed_cli.decoders.predict.latency import block_axes, coordinate, width_ladder
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.groups import channel_groups
from flashvaed_cli.decoders.spec.layers import ConvSpec, NormSpec, SpacePadding, TimePadding
from flashvaed_cli.decoders.variants import exact
from flashvaed_cli.decoders.variants.exact import exact_changes, exact_decoder
from flashvaed_cli.errors import SpecError
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.surgery.rows import gather_patches
from tests.injected_noise import injected_noise
from tests.ltx_toy import VERSIONS, flash_ltx_spec, ltx_decoder, ltx_spec
from tests.toy import toy_latents


def layer(time_padding: TimePadding, space_padding: SpacePadding = "zeros", operator: str = "causal3d") -> Conv:
    conv = build_conv(
        ConvSpec(
            operator=operator,  # type: ignore[arg-type]
            in_width=3,
            out_width=4,
            kernel=(3, 3, 3),
            time_padding=time_padding,
            space_padding=space_padding,
        ),
        "x",
    )
    return conv.double().requires_grad_(False)


def padded(x: Tensor, time_padding: TimePadding, space_padding: SpacePadding) -> Tensor:
    """By hand: frame indices instead of copies."""
    t = x.shape[2]
    if time_padding == "zeros_around":
        x = F.pad(x, (0, 0, 0, 0, 1, 1))
    else:
        at = {"first": range(-2, t), "edges": range(-1, t + 1)}[time_padding]
        x = x[:, :, [min(max(i, 0), t - 1) for i in at]]
    mode = "constant" if space_padding == "zeros" else space_padding
    return F.pad(x, (1, 1, 1, 1, 0, 0), mode=mode)


@pytest.mark.parametrize("space_padding", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize("time_padding", ["first", "edges", "zeros_around"])
def test_padding_by_hand(time_padding: TimePadding, space_padding: SpacePadding) -> None:
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    conv = layer(time_padding, space_padding)
    window = padded(x, time_padding, space_padding)
    expected = F.conv3d(window, conv.weight, conv.bias)
    assert torch.allclose(conv(x), expected)
    positions = torch.arange(2 * 4 * 5 * 6)
    patches = gather_patches(x, (3, 3, 3), positions, time_padding, space_padding).flatten(1)
    rows = expected.permute(0, 2, 3, 4, 1).reshape(-1, 4)
    assert torch.allclose(patches @ conv.weight.flatten(1).T + conv.bias, rows)


@pytest.mark.parametrize("operator", ["tapwise3d", "winograd3d"])
@pytest.mark.parametrize("space_padding", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize("time_padding", ["first", "edges", "zeros_around"])
def test_exact_twins_know_the_padding(time_padding: TimePadding, space_padding: SpacePadding, operator: str) -> None:
    plain, twin = (layer(time_padding, space_padding, operator=name) for name in ("causal3d", operator))
    twin.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 3, 48, 48, dtype=torch.float64)
    assert torch.allclose(twin(x), plain(x), atol=1e-10)
    if time_padding == "first":
        future: dict[str, Tensor] = {}
        parts = [twin(x[:, :, :1], None, future), twin(x[:, :, 1:], dict(future))]
        assert torch.allclose(torch.cat(parts, dim=2), plain(x), atol=1e-10)


def test_specs_refuse_padding_that_cannot_be() -> None:
    for changes in (
        {"kernel": (1, 3, 3), "time_padding": "first"},
        {"kernel": (2, 3, 3), "time_padding": "edges"},
        {"kernel": (2, 3, 3), "time_padding": "zeros_around"},
        {"operator": "stacked3d", "time_padding": "edges"},
        {"operator": "stacked3d", "time_padding": "zeros_around"},
        {"operator": "subpixel2d", "kernel": (1, 3, 3), "space_padding": "reflect"},
    ):
        given = {"operator": "causal3d", "in_width": 2, "out_width": 2, "kernel": (3, 3, 3), **changes}
        with pytest.raises(ValueError, match=r"pad|taps"):
            ConvSpec(**given)  # type: ignore[arg-type]


def test_norms_by_hand() -> None:
    x = torch.randn(2, 5, 3, 4, 4)
    plain = ChannelRMSNorm(5, NormSpec(eps=1e-2, gain=False))
    assert list(plain.state_dict()) == []
    expected = x / (x.square().mean(1, keepdim=True) + 1e-2).sqrt()
    shifted = ChannelRMSNorm(5, NormSpec(eps=1e-2, shift=True))
    with torch.no_grad():
        shifted.get_parameter("gamma").uniform_(0.5, 1.5)
        shifted.get_parameter("beta").normal_()
    by_channel = [shifted.get_parameter(name).detach().view(-1, 1, 1, 1) for name in ("gamma", "beta")]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.allclose(plain(x), expected, atol=1e-6)
            assert torch.allclose(shifted(x), expected * by_channel[0] + by_channel[1], atol=1e-6)
    half = shifted.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    norm = ChannelLayerNorm(5)
    assert torch.allclose(norm(x).mean(1), torch.zeros(()), atol=1e-6)


def test_cells_and_back() -> None:
    x = torch.randn(1, 24, 2, 3, 4)
    y = channels_to_cells(x, (2, 3, 2))
    assert y.shape == (1, 2, 4, 9, 8)
    assert torch.equal(y[0, 1, 3, 5, 2], x[0, 12 + 6 + 2 * 2 + 0, 1, 1, 1])
    assert torch.equal(cells_to_channels(y, (2, 3, 2)), x)


@pytest.mark.parametrize("version", VERSIONS[:2])
def test_the_exact_decoder_and_tiles_give_the_same_frames(version: str) -> None:
    decoder = ltx_decoder(ltx_spec(version)).double()
    x = toy_latents(2, 4, 4).double()
    whole = decode(decoder, x)
    twin = exact_decoder(decoder, device_type="cpu")
    assert exact_changes(decoder.spec, twin.spec)
    assert (decode(twin, x) - whole).abs().max() < 1e-9
    if version == VERSIONS[1]:
        assert torch.equal(twin.at("up0.1").get_buffer("noise1"), decoder.at("up0.1").get_buffer("noise1"))
    tiled = DecodeRuntime(decoder, DecodeSettings(tile=2))
    assert (tiled.decode(x) - whole).abs().max() < 1e-9


MIRRORED: dict[str, DecoderSpec] = {
    "original": ltx_spec(VERSIONS[3], causal=True),
    "flash": flash_ltx_spec(VERSIONS[3], causal=True),
}


@pytest.mark.parametrize("name", MIRRORED)
@pytest.mark.parametrize("split", ["up0.0", "up1.0", "up2.0", "head.0"])
def test_a_mirrored_decoder_tiles_too(name: str, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels mirrored at a tile's inner border are cut off with the halo; those at the frame's border stay."""
    monkeypatch.setattr(winograd, "is_worthwhile", lambda *_, **__: True)
    monkeypatch.setattr(exact, "WINOGRAD_WIDTH", 4)
    monkeypatch.setattr(planning, "split_addresses", lambda _: (split,))
    decoder = ltx_decoder(MIRRORED[name]).double()
    twin = exact_decoder(decoder, device_type="cpu")
    mirroring = {layer.operator for _, layer in twin.spec.layers() if layer.space_padding == "reflect"}
    assert mirroring == ({"winograd3d"} if name == "original" else {"winograd3d", "tapwise3d", "dwsep3d", "frame2d"})
    x = toy_latents(2, 3, 4).double()
    whole = decode(decoder, x)
    for tile in (None, 1, 2, 3):
        runtime = DecodeRuntime(twin, DecodeSettings(tile=tile, chunk=1))
        assert (runtime.decode(x) - whole).abs().max() < 1e-9


def test_a_mirrored_decoder_needs_two_latents() -> None:
    decoder = ltx_decoder(MIRRORED["original"])
    for refusing in (decoder, exact_decoder(decoder)):
        with pytest.raises(SpecError, match="give at least 2x2 latents"):
            decode(refusing, toy_latents(2, 4, 1))


@pytest.mark.parametrize("version", VERSIONS)
def test_costs_count_every_weight(version: str) -> None:
    for make in (ltx_spec, flash_ltx_spec):
        decoder = ltx_decoder(make(version))
        assert sum(stage.parameters for stage in stage_costs(decoder.spec, (2, 2, 2))) == decoder.parameter_count


def test_flop_by_hand() -> None:
    """The layer before a shuffle works on the small grid, the layers after it on the large one."""
    spec = ltx_spec()
    costs = {layer.address: layer.flop for stage in stage_costs(spec, (2, 3, 4)) for layer in stage.layers}
    assert costs["up1.0.conv"] == 2 * 27 * 16 * 8 * 16 * 2 * 12
    assert costs["up1.1.conv1"] == 2 * 27 * 16 * 16 * 3 * 48
    assert costs["head.0.conv"] == 2 * 27 * 4 * 48 * 9 * 12 * 64


@pytest.mark.parametrize("version", VERSIONS)
def test_the_latency_grid_holds_every_pair_of_widths(version: str) -> None:
    spec, shallow = ltx_spec(version), get_family(version).shallow_stages
    groups = [group for group in channel_groups(spec) if group.stage in shallow]
    ladders = {group.name: width_ladder(group.width) for group in groups}
    grid = [{group.name: group.width for group in groups}, *_grid(spec, groups, ladders)]
    for axes in block_axes(spec, groups).values():
        points = {tuple(coordinate(axis, widths) for axis in axes) for widths in grid}
        sides = [len({point[i] for point in points}) for i in range(len(axes))]
        assert len(points) == (sides[0] if len(sides) == 1 else sides[0] * sides[1])


def test_noise_needs_to_be_asked_for() -> None:
    decoder = ltx_decoder(ltx_spec(VERSIONS[1], causal=True))
    for _, block in decoder.blocks():
        if hasattr(block, "noise1"):
            block.noise1.fill_(0.3)  # type: ignore[union-attr, operator]
    x = toy_latents(3)
    quiet = decode(decoder, x)
    with injected_noise(decoder, seed=1):
        noisy = decode(decoder, x)
    with injected_noise(decoder, seed=1):
        chunked = decode(decoder, x, chunk=1)
    assert (noisy - quiet).abs().max() > 1e-2
    assert (chunked - noisy).abs().max() < 1e-3  # float32 rounding, which narrow norms amplify
    assert torch.equal(decode(decoder, x), quiet)
