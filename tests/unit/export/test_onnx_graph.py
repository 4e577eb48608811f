from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from small_decoders import low_rank_spec

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.errors import ExportError
from flashvaed_cli.export import onnx_graph, onnx_trace, parity
from flashvaed_cli.export.onnx_check import OnnxDecoder
from flashvaed_cli.export.onnx_graph import GraphKind, OnnxOptions, export_onnx
from flashvaed_cli.export.onnx_weights import INLINE_BYTES
from flashvaed_cli.export.parity import seeded_latents
from flashvaed_cli.export.result import ExportResult

FP32_TOLERANCE = 1e-5  # of frames in [-1, 1]: ten times what two float32 runtimes were seen to differ by


def _axes(value: onnx.ValueInfoProto) -> list[str | int]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


def _labels(path: Path) -> dict[str, Any]:
    return json.loads({entry.key: entry.value for entry in onnx.load(path).metadata_props}["flashvaed"])


def _replay(monkeypatch: pytest.MonkeyPatch, files: Iterable[Path]) -> None:
    """Graphs that were exported before in the place of traced ones."""
    models = iter([ir.load(file) for file in files])
    monkeypatch.setattr(onnx_graph, "trace_graph", lambda *_, **__: next(models))
    monkeypatch.setattr(onnx_graph, "label_model", lambda *_: None)


def test_clip_graph_is_checked(clip_export: ExportResult) -> None:
    assert [path.name for path in clip_export.paths] == ["decoder.onnx", "decoder.onnx.data"]
    assert clip_export.size_bytes == sum(path.stat().st_size for path in clip_export.paths)
    assert 0.0 < clip_export.max_abs_difference <= clip_export.tolerance == 1e-4
    assert clip_export.opset is not None
    assert {entry.version for entry in onnx.load(clip_export.path).opset_import if not entry.domain} == {
        clip_export.opset
    }
    assert clip_export.opset >= 17
    assert clip_export.onnxruntime_ms is not None
    assert clip_export.torch_ms is not None


@pytest.mark.parametrize(("batch", "grid"), [(1, (1, 1, 1)), (3, (1, 4, 3)), (2, (2, 3, 5)), (1, (5, 2, 2))])
def test_clip_graph_takes_any_batch_length_and_size(
    clip_export: ExportResult, flash_decoder: Decoder, batch: int, grid: tuple[int, int, int]
) -> None:
    latents = seeded_latents(flash_decoder.spec, grid, seed=1, batch=batch)
    frames = OnnxDecoder(clip_export.path).decode(latents)
    torch.testing.assert_close(frames, decode(flash_decoder, latents), atol=FP32_TOLERANCE, rtol=0)


def test_clip_graph_names_its_axes_and_carries_what_a_reader_needs(
    clip_export: ExportResult, latent_statistics: tuple[tuple[float, ...], tuple[float, ...]]
) -> None:
    graph = onnx.load(clip_export.path).graph
    assert _axes(graph.input[0]) == ["batch", 16, "latent_frames", "latent_height", "latent_width"]
    labels = _labels(clip_export.path)
    assert labels["kind"] == "onnx-clip"
    assert labels["latent_scale"] == "raw"
    assert (labels["latent_mean"], labels["latent_std"]) == tuple(list(row) for row in latent_statistics)
    assert labels["spec"] == low_rank_spec().model_dump(mode="json")
    assert labels["parent"] == "a hash"


def test_files_hold_no_path_of_the_machine_that_traced_them(
    clip_export: ExportResult, step_export: ExportResult, repository: Path
) -> None:
    for path in (*clip_export.paths, *step_export.paths):
        content = path.read_bytes()
        assert str(repository).encode() not in content
        assert b"site-packages" not in content


@pytest.mark.parametrize("chunks", [(1,), (1, 1, 1, 1), (2, 3), (3, 1, 1)])
def test_step_graphs_stream_in_any_chunks(
    step_export: ExportResult, flash_decoder: Decoder, chunks: tuple[int, ...]
) -> None:
    latents = seeded_latents(flash_decoder.spec, (sum(chunks), 3, 2), seed=2, batch=len(chunks))
    frames = OnnxDecoder(*step_export.paths).decode(latents, chunks)
    torch.testing.assert_close(frames, decode(flash_decoder, latents), atol=FP32_TOLERANCE, rtol=0)


def test_step_graphs_name_caches_after_layers(step_export: ExportResult) -> None:
    assert [path.name for path in step_export.paths] == ["decoder.step.first.onnx", "decoder.step.next.onnx"]
    first, following = (onnx.load(path).graph for path in step_export.paths)
    caches = _labels(step_export.path)["caches"]
    # The layers with temporal taps; those that look at single frames keep nothing.
    assert caches == {
        "conv_in_0_conv": "conv_in.0.conv",
        "up0_0_conv1": "up0.0.conv1",
        "up0_0_conv2": "up0.0.conv2",
        "up0_1_temporal": "up0.1.temporal",
        "head_0_conv": "head.0.conv",
    }
    assert [value.name for value in first.input] == ["latents"]
    assert [value.name for value in following.input] == ["latents", *(f"past_{name}" for name in caches)]
    for graph in (first, following):
        assert [value.name for value in graph.output] == ["frames", *(f"future_{name}" for name in caches)]
    assert _axes(following.input[-1]) == ["batch", 4, 2, "4*latent_height", "4*latent_width"]
    assert [_axes(value) for value in following.input[1:]] == [_axes(value) for value in following.output[1:]]


def test_the_clip_graph_computes_no_caches(clip_export: ExportResult) -> None:
    """It is made from the first step's, whose caches and the layers' windows for them are left out."""
    graph = onnx.load(clip_export.path).graph
    assert [value.name for value in graph.output] == ["frames"]
    read = {name for node in graph.node for name in node.input}
    assert {name for node in graph.node for name in node.output} - read == {"frames"}
    assert {tensor.name for tensor in graph.initializer} <= read


def test_float16_graph(flash_decoder: Decoder, tmp_path: Path) -> None:
    options = OnnxOptions(dtype=torch.float16)
    (result,) = export_onnx(flash_decoder, tmp_path / "half.onnx", options=options, kinds=("clip",))
    assert 0.0 < result.max_abs_difference <= result.tolerance == 1e-2
    assert onnx.load(result.path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


@pytest.mark.parametrize("kind", ["clip", "step"])
def test_graph_that_decodes_otherwise_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    flash_decoder: Decoder,
    clip_export: ExportResult,
    step_export: ExportResult,
    kind: GraphKind,
) -> None:
    other = Decoder(flash_decoder.spec)
    other.load_state_dict(flash_decoder.state_dict())
    with torch.no_grad():
        other.get_parameter("stages.up0.0.conv1.bias")[0] += 0.1
    _replay(monkeypatch, clip_export.paths[:1] if kind == "clip" else step_export.paths)
    with pytest.raises(ExportError, match="differs from the decoder"):
        export_onnx(other, tmp_path / "decoder.onnx", kinds=(kind,))
    assert list(tmp_path.iterdir()) == []


def test_failed_export_keeps_the_file_that_was_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flash_decoder: Decoder, clip_export: ExportResult
) -> None:
    monkeypatch.setitem(onnx_graph.TOLERANCES, torch.float32, 0.0)
    monkeypatch.setattr(parity, "ROUNDING_FACTOR", 0.0)
    _replay(monkeypatch, clip_export.paths[:1])
    (tmp_path / "decoder.onnx").write_bytes(b"before")
    with pytest.raises(ExportError, match="tolerance 0"):
        export_onnx(flash_decoder, tmp_path / "decoder.onnx", kinds=("clip",))
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("decoder.onnx", b"before")]


def test_graph_that_onnxruntime_refuses_is_an_error(tmp_path: Path, clip_export: ExportResult) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match="cannot load"):
        OnnxDecoder(tmp_path / "broken.onnx")
    with pytest.raises(ExportError, match=r"cannot run .*\[1, 15, 1, 2, 2\]"):
        OnnxDecoder(clip_export.path).decode(torch.zeros(1, 15, 1, 2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [(OnnxOptions(opset=17), "opset 18 or higher, not 17"), (OnnxOptions(dtype=torch.bfloat16), "not bfloat16")],
)
def test_options_that_cannot_be_met(flash_decoder: Decoder, tmp_path: Path, options: OnnxOptions, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export_onnx(flash_decoder, tmp_path / "decoder.onnx", options=options)
    assert list(tmp_path.iterdir()) == []


def test_all_graphs_share_one_copy_of_the_weights(flash_decoder: Decoder, onnx_exports: list[ExportResult]) -> None:
    clip, step = onnx_exports
    assert {path.name for path in clip.path.parent.iterdir()} == {path.name for path in (*clip.paths, *step.paths)}
    stored: set[tuple[str, str]] = set()
    for path in (clip.path, *step.paths):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            where = {entry.key: entry.value for entry in tensor.external_data}
            if where:
                assert where["location"] == "decoder.onnx.data"
                stored.add((where["offset"], where["length"]))
            else:
                assert len(tensor.raw_data) < INLINE_BYTES
    large = [p.numel() * 4 for p in flash_decoder.parameters() if p.numel() * 4 >= INLINE_BYTES]
    assert sum(int(length) for _, length in stored) <= 1.05 * sum(large)


def test_what_libraries_print_is_hidden(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Older releases of onnxscript tell how many rules they applied, on the output that is to be one document."""
    graph = SimpleNamespace(graph=SimpleNamespace(outputs=[1, 2]))

    def talkative(model: object) -> object:
        print("Applied 202 of general pattern rewrite rules.")
        return model

    monkeypatch.setattr(onnx_trace, "optimize", talkative)
    onnx_trace.without_caches(graph)  # type: ignore[arg-type]
    assert capsys.readouterr().out == "" and graph.graph.outputs == [1]
