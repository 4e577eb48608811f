"""Chunks of LTX-Video: with a state if it is causal, with computed windows if it sees frames ahead.

In float64, so that only rounding can differ, which the norms of narrow toys amplify.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashvaed_cli.decoders.modules.coder import Encoder
from flashvaed_cli.decoders.predict.lookahead import latent_windows, time_halo, widest_window
from flashvaed_cli.decoders.predict.memory import predict_peak_bytes
from flashvaed_cli.decoders.predict.planning import choose_plan
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.run.streaming import decode, decode_step, encode, encode_step
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.errors import SpecError
from flashvaed_cli.families.ltx.config import with_time_padding
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.families.wan21.spec import wan_decoder_spec
from tests.ltx_toy import LATENT_WIDTH, VERSIONS, flash_ltx_spec, ltx_decoder, ltx_spec

ROUNDING = 1e-9


def latents(num_latents: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, LATENT_WIDTH, num_latents, 2, 2, generator=generator, dtype=torch.float64)


def short_sighted(spec: DecoderSpec, num_blocks: int = 1) -> DecoderSpec:
    """With fewer blocks per stage: a small halo."""
    stages = [
        stage if len(stage.blocks) == 1 else stage.model_copy(update={"blocks": _led(stage.blocks, num_blocks)})
        for stage in spec.stages
    ]
    return DecoderSpec(**{**dict(spec), "stages": tuple(stages)})


def _led(blocks: tuple, num_blocks: int) -> tuple:
    """The blocks up to the resampler, and `num_blocks` after it."""
    lead = next((i + 1 for i, block in enumerate(blocks) if block.kind == "shuffle_upsample"), 0)
    return blocks[: lead + num_blocks]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_causal_decoder_hands_on_a_state(version: str) -> None:
    decoder = ltx_decoder(short_sighted(ltx_spec(version, causal=True))).double()
    x = latents(4)
    whole = decode(decoder, x)
    assert whole.shape == (1, 3, 25, 64, 64)
    for chunk in (1, 3):
        assert (decode(decoder, x, chunk=chunk) - whole).abs().max() < ROUNDING
        parts = torch.cat(list(DecodeRuntime(decoder, DecodeSettings()).iter_parts(x.split(chunk, dim=2))), dim=2)
        assert (parts.clamp(-1, 1) - whole).abs().max() < ROUNDING


@pytest.mark.parametrize(
    ("make", "version"), [(ltx_spec, VERSIONS[0]), (ltx_spec, VERSIONS[3]), (flash_ltx_spec, VERSIONS[1])]
)
def test_a_centred_decoder_gets_windows(make: Callable[..., DecoderSpec], version: str) -> None:
    spec = short_sighted(make(version))
    decoder = ltx_decoder(spec).double()
    num_latents = sum(time_halo(spec)) + 3
    x = latents(num_latents)
    whole = decode(decoder, x)
    assert whole.shape[2] == 1 + 8 * (num_latents - 1)
    assert (decode(decoder, x, chunk=5) - whole).abs().max() < ROUNDING
    parts = list(DecodeRuntime(decoder, DecodeSettings()).iter_parts(x.split(3, dim=2)))
    assert [part.shape[2] for part in parts][:2] == [17, 24]
    assert (torch.cat(parts, dim=2).clamp(-1, 1) - whole).abs().max() < ROUNDING
    runtime = DecodeRuntime(decoder, DecodeSettings(chunk=6))
    assert (runtime.decode(x) - whole).abs().max() < ROUNDING


def test_the_halo_is_as_wide_as_it_must_be() -> None:
    """A latent outside a frame's window changes nothing; the windows are at most one latent wider than needed."""
    spec = short_sighted(ltx_spec())
    decoder = ltx_decoder(spec).double()
    before, after = time_halo(spec)
    middle = before + 2
    x = latents(middle + after + 3)
    whole = decode(decoder, x)
    first, last = 8 * (middle - 1) + 1, 8 * middle

    def changes(at: int) -> float:
        other = x.clone()
        other[:, :, at] += 1
        return float((decode(decoder, other) - whole)[:, :, first : last + 1].abs().max())

    assert changes(middle - before - 1) == 0 == changes(middle + after + 1)
    assert changes(middle + after) > 0
    assert changes(middle - before) + changes(middle - before + 1) > 0


def test_full_specs() -> None:
    halos = {version: time_halo(ltx_spec(version)) for version in VERSIONS}
    # By hand for 0.9.0, in latents: 1 + 8 + 6 + 1 at their rate, 6 + 3 halves, 7 quarters, 9 eighths.
    assert halos["ltx-video-0.9.0"][1] == 24
    assert all(before >= after > 0 for before, after in halos.values())
    assert time_halo(wan_decoder_spec(4))[1] == 0 == time_halo(ltx_spec(causal=True))[1]


def test_windows_cover_every_frame_once() -> None:
    spec = short_sighted(ltx_spec())
    for num_latents, chunk in ((1, 1), (7, 3), (40, 6)):
        done = 0
        for window in latent_windows(spec, num_latents, chunk):
            assert window.start * 8 + window.keep_start == done
            done = window.start * 8 + window.keep_stop
            assert window.stop - window.start <= widest_window(spec, num_latents, chunk)
        assert done == 1 + 8 * (num_latents - 1)


def test_steps_without_frames_ahead_are_refused() -> None:
    with pytest.raises(SpecError, match="sees frames ahead"):
        decode_step(ltx_decoder(ltx_spec()), latents(1).float(), None)


def test_plans_know_what_windows_cost() -> None:
    """Chunks of a causal decoder cost next to nothing; those of a centred one are decoded with their halo."""
    grid = (60, 8, 12)
    causal, centred = (choose_plan(ltx_spec(causal=flag), grid, chunk=2).relative_cost for flag in (True, False))
    assert causal < 1.1 < 20 < centred
    small, large = (predict_peak_bytes(ltx_spec(), grid, chunk=chunk) for chunk in (2, 60))
    assert predict_peak_bytes(ltx_spec(causal=True), grid, chunk=2) < small < large


def test_an_encoder_that_sees_ahead_takes_a_video_at_once() -> None:
    spec = with_time_padding(get_family(VERSIONS[0]).encoder_spec(2, 2), "edges")
    encoder = Encoder(spec).eval()
    pixels = torch.randn(1, 3, 17, 32, 32)
    with torch.no_grad():
        whole = encode(encoder, pixels)
        assert torch.equal(encode(encoder, pixels, chunk=1), whole)
        causal = Encoder(with_time_padding(spec, "first")).eval()
        causal.load_state_dict(encoder.state_dict())
        assert not torch.allclose(encode(causal, pixels)[:, :, :1], whole[:, :, :1])
        _, past = encode_step(encoder, pixels[:, :, :9], None)
        with pytest.raises(SpecError, match="takes a video at once"):
            encode_step(encoder, pixels[:, :, 9:], past)


@torch.no_grad()
def test_zeros_around_a_clip_are_not_those_of_a_window() -> None:
    """Chunks read as many latents around them as they need, and see padding only at the ends of the clip."""
    spec = with_time_padding(short_sighted(ltx_spec()), "zeros_around")
    decoder = ltx_decoder(spec).double()
    assert not spec.is_causal and time_halo(spec) == time_halo(short_sighted(ltx_spec()))
    x = latents(6)
    assert (decode(decoder, x, chunk=1) - decode(decoder, x)).abs().max() < ROUNDING
