"""All code that works on specs, on a decoder with bypasses and patches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashvaed_cli.decoders.modules.coder import Encoder
from flashvaed_cli.decoders.predict.cost import stage_costs
from flashvaed_cli.decoders.predict.latency import block_axes
from flashvaed_cli.decoders.predict.memory import predict_peak_bytes
from flashvaed_cli.decoders.predict.tiling import split_addresses
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.run.streaming import decode, encode
from flashvaed_cli.decoders.spec.groups import channel_groups, consumers, producers
from flashvaed_cli.decoders.variants.exact import exact_decoder, exact_spec
from flashvaed_cli.families.registry import FAMILIES
from flashvaed_cli.families.wan22.spec import WAN22, wan22_decoder_spec, wan22_encoder_spec
from tests.toy import WAN22_SPECS, fill_, toy_decoder, toy_latents, wan22_spec

EXACT = 1e-9  # winograd's transforms lose a digit of float64
PRECISE = {name: toy_decoder(spec).double() for name, spec in WAN22_SPECS.items()}


def assert_close(found: Tensor, expected: Tensor, bound: float = EXACT) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


@given(name=st.sampled_from(list(PRECISE)), num_latents=st.integers(1, 5), chunk=st.integers(1, 6))
@settings(max_examples=20)
def test_every_chunk_size_decodes_the_same_frames(name: str, num_latents: int, chunk: int) -> None:
    latents = toy_latents(num_latents, 1, 2).double()
    whole = decode(PRECISE[name], latents)
    assert whole.shape == (1, 3, 1 + 4 * (num_latents - 1), 16, 32)
    assert_close(decode(PRECISE[name], latents, chunk=chunk), whole, 1e-10)


@given(num_latents=st.integers(1, 4), chunk=st.integers(1, 5))
@settings(max_examples=10)
def test_every_chunk_size_encodes_the_same_latents(num_latents: int, chunk: int) -> None:
    encoder = Encoder(wan22_encoder_spec(2, 4)).double().requires_grad_(False)
    fill_(encoder)
    generator = torch.Generator().manual_seed(num_latents)
    pixels = torch.rand(1, 3, 1 + 4 * (num_latents - 1), 16, 32, generator=generator, dtype=torch.float64) * 2 - 1
    whole = encode(encoder, pixels)
    assert whole.shape == (1, 4, num_latents, 1, 2)
    assert_close(encode(encoder, pixels, chunk=chunk), whole, 1e-10)


@given(
    name=st.sampled_from(list(PRECISE)),
    size=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6)),
    chunk=st.none() | st.integers(1, 3),
    tile=st.none() | st.integers(1, 5),
    memory_format=st.sampled_from(["contiguous", "channels-last"]),
)
@settings(max_examples=12)
def test_tiles_chunks_and_twins_give_the_whole_clips_frames(name, size, chunk, tile, memory_format) -> None:
    latents = toy_latents(*size).double()
    runtime = DecodeRuntime(
        exact_decoder(PRECISE[name]), DecodeSettings(chunk=chunk, tile=tile, memory_format=memory_format)
    )
    assert_close(runtime.decode(latents), decode(PRECISE[name], latents))


def test_tiles_begin_where_no_bypass_is_open() -> None:
    assert split_addresses(wan22_spec()) == ("up0.0", "up1.0", "up2.0", "up3.0", "head.0")


@pytest.mark.parametrize("name", WAN22_SPECS)
def test_parameters_are_those_of_the_module(name: str) -> None:
    costs = stage_costs(WAN22_SPECS[name], (3, 2, 2))
    assert sum(cost.parameters for cost in costs) == toy_decoder(WAN22_SPECS[name]).parameter_count


def test_a_bypass_without_a_layer_costs_memory_only() -> None:
    spec = wan22_decoder_spec(16)
    bare = spec.model_copy(update={"stages": tuple(s.model_copy(update={"bypass": None}) for s in spec.stages)})
    costs = [[(c.flop, c.parameters) for c in stage_costs(each, (3, 4, 4))] for each in (spec, bare)]
    assert costs[0] == costs[1]
    peaks = [[c.peak_activation_elements for c in stage_costs(each, (3, 4, 4))] for each in (spec, bare)]
    assert all(with_it >= without for with_it, without in zip(*peaks, strict=True)) and peaks[0] != peaks[1]
    assert predict_peak_bytes(spec, (5, 30, 52)) >= predict_peak_bytes(bare, (5, 30, 52))


def test_the_bypass_reads_and_writes_channel_groups() -> None:
    groups = {group.name: group for group in channel_groups(WAN22_SPECS["pruned"])}
    assert producers(WAN22_SPECS["pruned"], groups["up3.entry"]) == ["up2.3.spatial", "up2.3.bypass"]
    assert "up2.3.bypass" in [c.layer for c in consumers(WAN22_SPECS["pruned"], groups["up2.entry"])]
    whole = {group.name: group for group in channel_groups(wan22_spec())}
    assert producers(wan22_spec(), whole["up3.entry"]) == ["up2.3.spatial"]
    assert [c.layer for c in consumers(wan22_spec(), whole["up2.entry"])] == ["up2.0.conv1", "up2.0.shortcut", None]


def test_the_time_of_a_bypass_depends_on_what_enters_it() -> None:
    groups = [group for group in channel_groups(wan22_spec()) if group.stage in WAN22.shallow_stages]
    assert block_axes(wan22_spec(), groups)["up2.3"] == (("up2.stream", "up2.entry"), ("up3.entry",))
    assert block_axes(wan22_spec(), groups)["up1.3"] == (("up2.entry",),)


def test_exact_operators_leave_a_bypass_alone() -> None:
    for spec in WAN22_SPECS.values():
        assert [stage.bypass for stage in exact_spec(spec).stages] == [stage.bypass for stage in spec.stages]


def test_the_released_size() -> None:
    decoder, encoder = wan22_decoder_spec(256), wan22_encoder_spec(160)
    parameters = [sum(cost.parameters for cost in stage_costs(spec, (1, 16, 16))) for spec in (decoder, encoder)]
    assert sum(parameters) == 704_688_668  # as diffusers counts them
    assert FAMILIES["wan2.2"].latent_width == 48 == len(WAN22.latent_mean) == len(WAN22.latent_std)
