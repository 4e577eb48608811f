"""ONNX of a causal LTX decoder: the streaming graphs reproduce its frames in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import torch

from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.decoders.spec.blocks import HeadSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec, StageSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec
from flashvaed_cli.export.onnx_check import OnnxDecoder
from flashvaed_cli.export.onnx_graph import TOLERANCES, OnnxOptions, export_onnx
from flashvaed_cli.families.ltx.spec import CONDITIONED_NORM
from tests.ltx_toy import LATENT_WIDTH, VERSIONS, ltx_decoder, ltx_spec


def test_the_streaming_graphs(tmp_path: Path) -> None:
    """One stage: a residual shuffle, norms with shift, repeated first frames; quick to trace."""
    spec = ltx_spec(VERSIONS[2], causal=True)
    head = HeadSpec(
        conv=ConvSpec(operator="causal3d", in_width=16, out_width=48, kernel=(3, 3, 3), time_padding="first"),
        norm=CONDITIONED_NORM,
    )
    stages = (
        spec.stage("conv_in"),
        StageSpec(name="up0", blocks=spec.stage("up0").blocks[:2]),
        StageSpec(name="head", blocks=(head,)),
    )
    update = {"stages": stages, "temporal_factor": 2, "spatial_factor": 8}
    decoder = ltx_decoder(DecoderSpec(**{**dict(spec), **update}))
    for layer in ("conv_in.0", "up0.0"):
        decoder.get_parameter(f"stages.{layer}.conv.bias").zero_()
    (result,) = export_onnx(decoder, tmp_path / "x.onnx", kinds=("step",))
    assert result.max_abs_difference < TOLERANCES[OnnxOptions().dtype]
    assert {path.name for path in result.paths} == {"x.step.first.onnx", "x.step.next.onnx", "x.onnx.data"}
    # A norm of zeros divides by the root of its eps alone, which torch's ONNX optimiser takes for nothing.
    nothing = torch.zeros(1, LATENT_WIDTH, 2, 2, 3)
    frames = OnnxDecoder(*result.paths[:2]).decode(nothing, (1, 1))
    torch.testing.assert_close(frames, decode(decoder, nothing), atol=1e-5, rtol=0)
