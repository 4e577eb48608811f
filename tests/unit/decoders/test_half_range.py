"""Decoders that are too loud for float16 still decode to the same frames there; others are left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.variants.exact import exact_decoder
from flashvaed_cli.decoders.variants.half_range import cast_decoder, fit_half_range
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.families.wan21.spec import wan_decoder_spec
from tests.ltx_toy import flash_ltx_spec

LOUD = 2.0**17
SPECS = {
    "wan2.1": wan_decoder_spec(4),
    "wan2.2": get_family("wan2.2").decoder_spec(4, 16),
    "ltx": flash_ltx_spec(),
    "ltx-2": get_family("ltx-2").decoder_spec(4, 16),
    "sdxl": get_family("sdxl").decoder_spec(4, 4),
}


def loud_decoder(spec: DecoderSpec) -> Decoder:
    """A decoder whose first layer exceeds float16, with biases to match, so that its stream stays loud."""
    torch.manual_seed(0)
    decoder = Decoder(spec).eval().requires_grad_(False)
    for stage in decoder.stages.values():
        for block in stage:  # type: ignore[union-attr]
            for name, parameter in block.named_parameters():
                if name.endswith("depthwise"):
                    continue
                if name.startswith(("conv2.", "proj.")) or name.split(".")[0] in ("temporal", "spatial", "shortcut"):
                    is_whole = name.startswith(("conv2.", "proj."))
                    parameter.mul_(LOUD if is_whole or name.endswith("bias") else 1.0)
    decoder.stages["conv_in"][0].conv.weight.mul_(LOUD)  # type: ignore[index]
    return decoder


def latents_of(spec: DecoderSpec) -> Tensor:
    return torch.randn(1, spec.latent_width, 2, 4, 5)


@pytest.mark.parametrize("name", SPECS)
def test_scaling_changes_no_frame(name: str) -> None:
    decoder = loud_decoder(SPECS[name])
    latents = latents_of(decoder.spec)
    scaled = copy.deepcopy(decoder)
    exponents = fit_half_range(scaled)
    assert exponents["stream"] <= -9
    with torch.no_grad():
        before, after = decoder.double()(latents.double()), scaled.double()(latents.double())
    assert torch.allclose(before, after, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
def test_float16_decodes_what_overflowed_before(name: str, *, exact: bool) -> None:
    decoder = loud_decoder(SPECS[name])
    latents = latents_of(decoder.spec)
    with torch.no_grad():
        wanted = decoder(latents).clamp(-1, 1)
        assert not torch.isfinite(copy.deepcopy(decoder).half()(latents.half())).all()
    chosen = exact_decoder(decoder) if exact else decoder
    frames = DecodeRuntime(chosen, DecodeSettings(dtype=torch.float16)).decode(latents).float()
    assert (frames - wanted).square().mean().sqrt() < 0.02


def test_loud_insides_of_blocks_are_scaled_by_themselves() -> None:
    torch.manual_seed(0)
    decoder = Decoder(SPECS["ltx"]).eval().requires_grad_(False)
    block = next(block for _, block in decoder.stages.items() if hasattr(block[0], "conv1"))[0]  # type: ignore[index]
    block.conv1.weight.mul_(LOUD)
    latents = latents_of(decoder.spec).double()
    before = decoder.double()(latents)
    assert list(fit_half_range(decoder)) == [block.conv1.address]
    assert torch.allclose(before, decoder(latents), rtol=0, atol=1e-9)


def test_decoders_that_fit_are_left_alone() -> None:
    decoder = Decoder(SPECS["wan2.1"]).eval().requires_grad_(False)
    before = copy.deepcopy(decoder.state_dict())
    assert fit_half_range(decoder) == {}
    cast_decoder(decoder, torch.float16)
    assert all(torch.equal(tensor, before[name].half()) for name, tensor in decoder.state_dict().items())
