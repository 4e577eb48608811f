"""ONNX of a causal LTX decoder: the streaming graphs reproduce its frames in onnxruntime."""

from __future__ import annotations

from pathlib import Path

from flashvaed_cli.decoders.spec import DecoderSpec
from flashvaed_cli.export.onnx_graph import TOLERANCES, OnnxOptions, export_onnx_step
from tests.ltx_toy import VERSIONS, ltx_decoder, ltx_spec


def test_the_streaming_graphs(tmp_path: Path) -> None:
    """Few blocks: a residual shuffle, norms with shift, repeated first frames."""
    spec = ltx_spec(VERSIONS[2], causal=True)
    kept = {"conv_in": 1, "mid": 1, "up0": 1, "up1": 2, "up2": 1, "head": 1}
    stages = tuple(stage.model_copy(update={"blocks": stage.blocks[: kept[stage.name]]}) for stage in spec.stages)
    decoder = ltx_decoder(DecoderSpec(**{**dict(spec), "stages": stages}))
    result = export_onnx_step(decoder, tmp_path / "x.onnx", options=OnnxOptions())
    assert result.max_abs_difference < TOLERANCES[OnnxOptions().dtype]
    assert {path.name for path in result.paths} == {"x.first.onnx", "x.next.onnx"}
