"""A decoder of single images gives the pixels of the video decoder for one latent frame, without time in any layer."""

from __future__ import annotations

import pytest
import torch

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.decoders.spec.coders import DecoderSpec, StageSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec
from flashvaed_cli.decoders.variants.still import still_decoder
from flashvaed_cli.errors import SpecError
from flashvaed_cli.surgery.respec import narrowed_spec
from flashvaed_cli.surgery.transfer import transfer_weights
from tests.toy import DECODER_SPECS, WAN22_SPECS, kept_of, toy_decoder, toy_latents, wan22_spec

SPECS = {**DECODER_SPECS, **{f"wan2.2 {name}": spec for name, spec in WAN22_SPECS.items()}}


@pytest.mark.parametrize("name", SPECS)
def test_same_pixels(name: str) -> None:
    decoder = toy_decoder(SPECS[name]).double()
    still = still_decoder(decoder)
    latents = torch.cat([toy_latents(1, 2, 3, seed=seed) for seed in (0, 1)]).double()
    torch.testing.assert_close(decode(still, latents), decode(decoder, latents), rtol=0, atol=1e-12)
    assert all(layer.kernel[0] == 1 and layer.operator != "causal3d" for _, layer in still.spec.layers())
    assert still.parameter_count < 0.7 * decoder.parameter_count


def test_a_bypass_in_time_keeps_the_copies_of_the_first_frame() -> None:
    stages = ("up0", "up1", "up2")
    whole = toy_decoder(wan22_spec()).double()
    kept = kept_of(whole.spec, stages)
    pruned = transfer_weights(whole, narrowed_spec(whole.spec, kept), kept).double()
    for decoder, has_layer in ((whole, False), (pruned, True)):
        still = still_decoder(decoder)
        bypasses = [stage.bypass for stage in still.spec.stages if stage.bypass is not None]
        assert [bypass.conv is not None for bypass in bypasses] == [has_layer] * 3
        assert {bypass.temporal_factor for bypass in bypasses} == {1}
        torch.testing.assert_close(
            decode(still, toy_latents(1).double()), decode(decoder, toy_latents(1).double()), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("padding", ["first", "edges", "zeros_around"])
def test_a_repeated_first_frame_sums_the_taps_and_zeros_around_leave_the_middle_one(padding: str) -> None:
    spec = DECODER_SPECS["original"]
    conv = ConvSpec(**{**dict(spec.stage("head").blocks[0].conv), "time_padding": padding})  # type: ignore[union-attr]
    head = spec.stage("head").blocks[0].model_copy(update={"conv": conv})
    decoder = toy_decoder(spec.with_blocks({"head.0": head})).double()  # type: ignore[arg-type]
    latents = toy_latents(1).double()
    torch.testing.assert_close(decode(still_decoder(decoder), latents), decode(decoder, latents), rtol=0, atol=1e-12)


def test_videos_are_refused() -> None:
    still = still_decoder(toy_decoder())
    for run in (lambda z: decode(still, z), DecodeRuntime(still, DecodeSettings()).decode, still):
        with pytest.raises(SpecError, match="takes 1 latent frame, got 3: give each image as a clip of its own"):
            run(toy_latents(3))
    with pytest.raises(SpecError, match="single images already"):
        still_decoder(still)


def test_no_layer_of_a_still_spec_may_work_in_time() -> None:
    spec = DECODER_SPECS["original"]
    with pytest.raises(ValueError, match=r"conv_in\.0\.conv works in time"):
        DecoderSpec(**{**dict(spec), "still": True})
    up = still_decoder(toy_decoder()).spec.stage("up0").blocks
    late = StageSpec(name="up0", blocks=(*up[:3], spec.stage("up0").blocks[3]))
    stages = tuple(late if s.name == "up0" else s for s in still_decoder(toy_decoder()).spec.stages)
    with pytest.raises(ValueError, match=r"up0\.3\.temporal works in time"):
        DecoderSpec(**{**dict(spec), "stages": stages, "still": True})


def test_the_decoder_given_is_left_as_it_is() -> None:
    decoder = toy_decoder()
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    still = still_decoder(decoder)
    assert isinstance(still, Decoder)
    still.get_parameter("stages.head.0.conv.bias").add_(1)
    assert all(torch.equal(before[name], value) for name, value in decoder.state_dict().items())
