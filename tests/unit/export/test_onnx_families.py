"""ONNX graphs of a decoder with a bypass and patches, and of one for single images."""

from __future__ import annotations

from pathlib import Path

import torch
from small_decoders import small_decoder

from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.decoders.spec.blocks import HeadSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec, StageSpec
from flashvaed_cli.decoders.spec.convolutions import causal_conv
from flashvaed_cli.decoders.variants.still import still_decoder
from flashvaed_cli.export.onnx_check import OnnxDecoder
from flashvaed_cli.export.onnx_graph import export_onnx
from flashvaed_cli.export.parity import seeded_latents
from flashvaed_cli.families.wan22.spec import wan22_decoder_spec
from tests.toy import toy_decoder, wan22_spec


def short_spec() -> DecoderSpec:
    """Wan 2.2's entry, the upsampler of its first stage with the bypass around it, and a head: quick to trace."""
    spec = wan22_decoder_spec(4, 4)
    up = spec.stage("up0")
    stages = (
        *spec.stages[:2],
        StageSpec(name="up0", blocks=up.blocks[3:], bypass=up.bypass),
        StageSpec(name="head", blocks=(HeadSpec(conv=causal_conv(16, 12)),)),
    )
    return DecoderSpec(**{**dict(spec), "stages": stages, "temporal_factor": 2, "spatial_factor": 4})


def test_the_streaming_graphs_add_the_bypass(tmp_path: Path) -> None:
    decoder = small_decoder(short_spec())
    (result,) = export_onnx(decoder, tmp_path / "decoder.onnx", kinds=("step",))
    assert result.max_abs_difference <= result.tolerance
    latents = seeded_latents(decoder.spec, (4, 3, 2), seed=1)
    frames = OnnxDecoder(*result.paths[:2]).decode(latents, (1, 2, 1))
    torch.testing.assert_close(frames, decode(decoder, latents), atol=1e-5, rtol=0)


def test_an_image_has_one_latent_frame(tmp_path: Path) -> None:
    decoder = still_decoder(small_decoder(short_spec()))
    (result,) = export_onnx(decoder, tmp_path / "decoder.onnx", kinds=("clip",))
    assert result.max_abs_difference <= result.tolerance
    assert "raw latents [B, C, 1, H, W]" in result.notes[0]
    latents = seeded_latents(decoder.spec, (1, 4, 7), seed=1)
    torch.testing.assert_close(OnnxDecoder(result.path).decode(latents), decode(decoder, latents), atol=1e-5, rtol=0)


def test_a_whole_step_keeps_a_bypass_out_of_the_state() -> None:
    future: dict[str, torch.Tensor] = {}
    toy_decoder(wan22_spec())(torch.zeros(1, 4, 1, 1, 1), None, future)
    assert not [address for address in future if "bypass" in address]
