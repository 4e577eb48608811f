"""Whole decoders with exact operators and back: the same frames, for every chunk size."""

from __future__ import annotations

import pytest
import torch

from flashvaed_cli.decoders.modules import winograd
from flashvaed_cli.decoders.modules.coder import Encoder
from flashvaed_cli.decoders.modules.memory_format import channels_last, use_channels_last
from flashvaed_cli.decoders.run.streaming import decode, encode
from flashvaed_cli.decoders.spec.blocks import HeadSpec, UpsampleSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec
from flashvaed_cli.decoders.variants.exact import (
    exact_changes,
    exact_coder,
    exact_decoder,
    exact_spec,
    plain_decoder,
    plain_spec,
)
from flashvaed_cli.families.registry import FAMILIES
from flashvaed_cli.families.wan21.spec import wan_decoder_spec, wan_encoder_spec
from tests.toy import DECODER_SPECS, fill_, toy_decoder, toy_latents

pytestmark = pytest.mark.unchecked  # many runs of what other modules check

DOUBLE = 1e-10  # of frames in [-1, 1], float64: thirty layers, each in another order of sums
SINGLE = 1e-4  # float32: Winograd loses 1e-5 of a layer's largest output
HALF = 0.05  # bfloat16 against itself: both round every layer to 8 bits


@pytest.fixture(autouse=True)
def _small_clips_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use Winograd even where it does not pay."""
    monkeypatch.setattr(winograd, "is_worthwhile", lambda *_, **__: True)


def wide_spec() -> DecoderSpec:
    """Widths 96, 48 and 24, so that every twin is chosen somewhere."""
    return wan_decoder_spec(24, 4)


@pytest.mark.parametrize("name", DECODER_SPECS)
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_same_frames_in_float64(name: str, chunk: int | None) -> None:
    decoder, latents = toy_decoder(DECODER_SPECS[name]).double(), toy_latents().double()
    exact = exact_decoder(decoder)
    assert exact_changes(decoder.spec, exact.spec) != []
    with torch.no_grad():
        torch.testing.assert_close(decode(exact, latents, chunk=chunk), decode(decoder, latents), rtol=0, atol=DOUBLE)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, SINGLE), (torch.bfloat16, HALF)])
def test_same_frames_in_lower_precision(layout: str, dtype: torch.dtype, bound: float) -> None:
    decoder, latents = toy_decoder(wide_spec()).to(dtype), toy_latents(2).to(dtype)
    exact = exact_decoder(decoder)
    assert {layer.operator for _, layer in exact.spec.layers()} >= {
        "winograd3d",
        "tapwise3d",
        "stacked3d",
        "subpixel2d",
    }
    with torch.no_grad():
        expected = decode(decoder, latents)
        if layout == "channels-last":
            exact, latents = use_channels_last(exact), channels_last(latents)
        found = decode(exact, latents)
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_an_encoder_gives_the_same_latents(name: str, chunk: int | None) -> None:
    family = FAMILIES[name]
    encoder = Encoder(family.encoder_spec(24 if name == "wan2.1" else 8, 4)).double()  # at 24, Winograd too
    encoder = encoder.eval().requires_grad_(False)
    fill_(encoder)
    spec, exact = encoder.spec, exact_coder(encoder)
    kt, ks = spec.temporal_factor, spec.spatial_factor
    pixels = torch.rand(1, 3, 1 if spec.still else 1 + 3 * kt, 2 * ks, ks, dtype=torch.float64) * 2 - 1
    expected = encode(encoder, pixels)
    torch.testing.assert_close(
        encode(exact, pixels, chunk=chunk), expected, rtol=0, atol=1e-9 * float(expected.abs().max())
    )
    assert plain_spec(exact.spec) == spec


@torch.no_grad()
def test_layers_with_strides_have_no_twins() -> None:
    spec = exact_spec(wan_encoder_spec(96, 16))
    operators = {address: layer.operator for address, layer in spec.layers()}
    assert operators["down1.0.conv1"] == "winograd3d"
    assert operators["down1.2.spatial"] == "frame2d"
    assert operators["down1.2.temporal"] == "causal3d"


def test_the_weights_are_shared() -> None:
    decoder = toy_decoder()
    exact = exact_decoder(decoder)
    names = {name: parameter.data_ptr() for name, parameter in decoder.named_parameters()}
    assert {name: parameter.data_ptr() for name, parameter in exact.named_parameters()} == names
    assert not exact.training
    assert plain_decoder(exact).spec == decoder.spec


@pytest.mark.parametrize("name", DECODER_SPECS)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_plain_spec_inverts(name: str, device_type: str) -> None:
    spec = DECODER_SPECS[name]
    exact = exact_spec(spec, device_type=device_type)
    assert plain_spec(exact) == spec
    assert exact_spec(exact, device_type=device_type) == exact
    assert DecoderSpec.model_validate_json(exact.model_dump_json()) == exact


def test_the_rule_on_the_released_widths() -> None:
    spec = wan_decoder_spec(96)
    changes = {address: new for address, _, new in exact_changes(spec, exact_spec(spec))}
    assert changes["conv_in.0.conv"] == "tapwise3d"
    assert changes["mid.0.conv1"] == changes["up3.2.conv2"] == "winograd3d"
    assert changes["up0.3.temporal"] == "tapwise3d"
    assert changes["up2.3.spatial"] == "subpixel2d"
    assert changes["head.0.conv"] == "stacked3d"
    assert "up1.0.shortcut" not in changes  # pointwise
    on_cuda = exact_changes(spec, exact_spec(spec, device_type="cuda"))
    assert on_cuda == [(f"up{i}.3.spatial", "frame2d", "subpixel2d") for i in range(3)]


def test_only_an_upsampler_may_enlarge() -> None:
    enlarging = ConvSpec(operator="subpixel2d", in_width=4, out_width=3, kernel=(1, 3, 3))
    spec = DECODER_SPECS["original"]
    with pytest.raises(ValueError, match="only an upsampler's spatial layer"):
        spec.with_blocks({"head.0": HeadSpec(conv=enlarging)})
    block = spec.stage("up2").blocks[3]
    assert isinstance(block, UpsampleSpec)
    with pytest.raises(ValueError, match="3x3 taps"):
        ConvSpec(operator="subpixel2d", in_width=4, out_width=3, kernel=(1, 5, 5))


def test_gradients_reach_every_parameter() -> None:
    decoder = toy_decoder(DECODER_SPECS["flash"])
    exact = exact_decoder(decoder).requires_grad_(True)
    exact(toy_latents()).square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in exact.parameters())
