"""Light decoders: the grid of every family, the same frames in any chunks, their specs."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError

from flashvaed_cli.artifact.header_checks import check_factors
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.predict.cost import stage_costs, total_gflop
from flashvaed_cli.decoders.predict.memory import predict_peak_bytes
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.decoders.spec.blocks import ChainSpec, ConvBlockSpec, HeadSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec, LatentEntrySpec
from flashvaed_cli.decoders.spec.light import LATENT_LIMIT, LightShape, default_width, has_same_blocks, light_spec
from flashvaed_cli.decoders.variants.exact import exact_decoder
from flashvaed_cli.decoders.variants.half_range import fit_half_range
from flashvaed_cli.decoders.variants.still import still_decoder
from flashvaed_cli.errors import SpecError
from flashvaed_cli.families.registry import FAMILIES
from tests.light_toy import ALL_SHAPES, SHAPES, WIDTH, filled, light_toy, light_toy_spec
from tests.toy import original_spec, toy_latents

ROUNDING = 3e-6
"""Float32, activations of order one: other chunks, tiles and twins add up in another order."""


def conv(in_width: int, out_width: int, kernel: tuple[int, int, int] = (1, 3, 3)) -> ConvSpec:
    operator = "causal3d" if kernel[0] > 1 else "pointwise" if kernel == (1, 1, 1) else "frame2d"
    return ConvSpec(operator=operator, in_width=in_width, out_width=out_width, kernel=kernel)


def _fits(shape: LightShape, name: str) -> bool:
    """Whether the family has a light decoder of that shape."""
    original = FAMILIES[name].decoder_spec(8, FAMILIES[name].latent_width)
    is_video = original.temporal_factor > 1 and not original.still
    on_cells = is_video and (original.temporal_factor, original.spatial_factor) == (4, 8)
    return {"tae": True, "efficientvit": True, "temporal-tae": is_video, "lean": on_cells}[shape]


@pytest.mark.parametrize("shape", ALL_SHAPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_light_decoder_that_streams_on_its_own_grid(name: str, shape: LightShape) -> None:
    family = FAMILIES[name]
    original = family.decoder_spec(8, family.latent_width)
    if not _fits(shape, name):
        reason = "single images: take tae" if shape == "temporal-tae" else r"lean decodes cells of .* take tae"
        with pytest.raises(SpecError, match=reason):
            light_spec(shape, original)
        return
    spec = light_spec(shape, original, mean=family.latent_mean, std=family.latent_std)
    check_factors(spec)
    assert (spec.temporal_factor, spec.spatial_factor) == (original.temporal_factor, original.spatial_factor)
    assert spec.is_causal and spec.still == original.still and not has_same_blocks(spec, original)
    latents = torch.randn(1, spec.latent_width, 1 if original.still else 3, 1, 2)
    decoder, factor = filled(spec), original.spatial_factor
    frames = decode(decoder, latents)
    assert frames.shape == (1, 3, original.num_frames(latents.shape[2]), factor, 2 * factor)
    torch.testing.assert_close(decode(decoder, latents, chunk=1), frames, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("name", "shape"), [(n, s) for n in FAMILIES for s in ALL_SHAPES if _fits(s, n)])
def test_a_step_of_training_moves_every_weight_towards_the_frames(name: str, shape: LightShape) -> None:
    family = FAMILIES[name]
    original = family.decoder_spec(8, family.latent_width)
    decoder = filled(light_spec(shape, original, mean=family.latent_mean, std=family.latent_std)).requires_grad_(True)
    latents = torch.randn(1, original.latent_width, 1 if original.still else 2, 2, 2)

    def loss() -> torch.Tensor:
        return decoder(latents).square().mean()

    before = loss()
    before.backward()
    for parameter_name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name
    scale = sum(p.grad.square().sum() for p in decoder.parameters() if p.grad is not None)
    with torch.no_grad():
        for parameter in decoder.parameters():
            assert parameter.grad is not None
            parameter -= 1e-3 * before / scale * parameter.grad
        assert loss() < before


@pytest.mark.parametrize(
    ("shape", "width"), [("tae", 192), ("temporal-tae", 192), ("efficientvit", 128), ("lean", 512)]
)
def test_for_the_released_wan_the_default_width_is_the_published_one(shape: LightShape, width: int) -> None:
    assert default_width(shape, FAMILIES["wan2.1"].decoder_spec(96, 16)) == width


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_give_the_frames_of_the_whole_clip(shape: LightShape, chunk: int) -> None:
    decoder, latents = light_toy(shape), toy_latents(5)
    whole = decode(decoder, latents)
    assert whole.std() > 0.01
    torch.testing.assert_close(decode(decoder, latents, chunk=chunk), whole, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_change_of_a_latent_leaves_earlier_frames_and_reaches_later_ones(shape: LightShape) -> None:
    decoder, latents = light_toy(shape), toy_latents(4)
    before = decode(decoder, latents)
    latents[:, :, 2] += 1
    changed = (decode(decoder, latents) - before).abs().amax((0, 1, 3, 4))
    assert changed[: 1 + 4].max() == 0 and changed[5:9].min() > 0
    assert changed[9:].max() > 0  # the past is seen


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_and_exact_twins_change_nothing(shape: LightShape) -> None:
    decoder, latents = light_toy(shape), toy_latents(3, 6, 7)
    whole = decode(decoder, latents)
    torch.testing.assert_close(decode(exact_decoder(decoder), latents), whole, rtol=0, atol=ROUNDING)
    runtime = DecodeRuntime(decoder, DecodeSettings(chunk=1, tile=3))
    torch.testing.assert_close(runtime.decode(latents), whole, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("shape", ["tae", "temporal-tae"])
def test_the_still_twin_gives_the_first_frame(shape: LightShape) -> None:
    decoder, latents = light_toy(shape), toy_latents(1)
    still = still_decoder(decoder)
    torch.testing.assert_close(decode(still, latents), decode(decoder, latents), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("shape", SHAPES)
def test_activations_beyond_float16_are_scaled_with_the_same_frames(shape: LightShape) -> None:
    decoder, latents = light_toy(shape), toy_latents(2)
    decoder.get_parameter("stages.conv_in.0.conv.weight").mul_(1e5)
    before = decoder(latents)
    assert fit_half_range(decoder)
    difference = (decoder(latents) - before).abs().max() / before.abs().max()
    assert difference < 1e-5  # powers of two; the copies of an efficientvit's bypass belong to the stream too


def test_the_entry_normalizes_and_clamps() -> None:
    decoder = light_toy("tae")
    entry = light_toy_spec("tae").stage("conv_in").blocks[0]
    assert isinstance(entry, ConvBlockSpec) and entry.entry is not None and entry.entry.limit == LATENT_LIMIT
    block = decoder.at("conv_in.0")
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (entry.entry.mean, entry.entry.std))
    latents = 5 * toy_latents(2)
    found = block.before_conv(latents)  # type: ignore[operator]
    torch.testing.assert_close(found, 3 * torch.tanh((latents - mean) / std / 3))
    assert found.abs().max() < LATENT_LIMIT


def test_a_chain_says_what_it_is() -> None:
    chain = ChainSpec(conv1=conv(4, 6, (2, 3, 3)), conv2=conv(6, 5), conv3=conv(5, 4))
    assert (chain.in_width, chain.out_width, tuple(chain.inner_tensors)) == (4, 4, ("conv1", "conv2"))
    assert chain.keeps_channels and chain.writers == ("conv3",)
    wider = ChainSpec(conv1=conv(4, 6), conv2=conv(6, 8), shortcut=conv(4, 8, (1, 1, 1)))
    assert wider.out_width == 8 and wider.writers == ("conv2", "shortcut") and not wider.carries_input
    with pytest.raises(ValidationError, match="identity shortcut cannot join 4 channels to 8"):
        ChainSpec(conv1=conv(4, 6), conv2=conv(6, 8))
    with pytest.raises(ValidationError, match="conv1 gives 6 channels, conv2 takes 5"):
        ChainSpec(conv1=conv(4, 6), conv2=conv(5, 4))
    with pytest.raises(ValidationError, match="pointwise, 4 to 8"):
        ChainSpec(conv1=conv(4, 6), conv2=conv(6, 8), shortcut=conv(4, 8))


def test_statistics_fit_the_latents() -> None:
    with pytest.raises(ValidationError, match="1 statistics for 2 latent channels"):
        ConvBlockSpec(conv=conv(2, 2), entry=LatentEntrySpec(mean=(0.0,), std=(1.0,)))
    with pytest.raises(ValidationError, match="2 means of latent channels, but 1 deviations"):
        LatentEntrySpec(mean=(0.0, 0.0), std=(1.0,))


@pytest.mark.parametrize("shape", SHAPES)
def test_specs_survive_json_and_say_nothing_new_of_older_blocks(shape: LightShape) -> None:
    spec = light_toy_spec(shape)
    assert DecoderSpec.model_validate_json(spec.model_dump_json()) == spec
    plain = json.loads(original_spec().model_dump_json())
    blocks = [block for stage in plain["stages"] for block in stage["blocks"]]
    assert all(not {"activation", "entry"} & set(block) for block in blocks)
    assert set(ConvBlockSpec(conv=conv(2, 2)).model_dump()) == {"kind", "conv"}
    assert set(HeadSpec(conv=conv(2, 3)).model_dump()) == {"kind", "conv", "norm"}


@pytest.mark.parametrize("shape", SHAPES)
def test_cost_counts_every_parameter(shape: LightShape) -> None:
    decoder = light_toy(shape)
    assert sum(stage.parameters for stage in stage_costs(decoder.spec, (1, 1, 1))) == decoder.parameter_count
    grids = [(3, 8, 8), (3, 16, 8)]
    assert total_gflop(decoder.spec, grids[1]) == pytest.approx(2 * total_gflop(decoder.spec, grids[0]))
    assert predict_peak_bytes(decoder.spec, (9, 32, 32), chunk=1) < predict_peak_bytes(decoder.spec, (9, 32, 32))


def test_a_width_that_does_not_suit_is_refused() -> None:
    with pytest.raises(SpecError, match="multiple of 8, not 12"):
        light_spec("efficientvit", FAMILIES["wan2.1"].decoder_spec(8, 16), 12)
    assert Decoder(light_spec("efficientvit", original_spec(), WIDTH)).spec.patch == 2
