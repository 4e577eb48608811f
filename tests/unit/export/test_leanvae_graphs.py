"""LeanVAE as graphs of other programs: one layer of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from counting_progress import CountingProgress

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.modules.naf_blocks import Branch
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.export.graphs import ClipGraph, traceable_copy
from flashvaed_cli.export.onnx_check import OnnxDecoder
from flashvaed_cli.export.onnx_graph import export_onnx
from flashvaed_cli.export.parity import seeded_latents
from flashvaed_cli.families.leanvae.spec import Depths, leanvae_decoder_spec
from tests.light_toy import filled


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return filled(leanvae_decoder_spec(2, 4, Depths(1, 1, 1, 1)))


def test_a_traced_copy_works_on_rows_and_gives_the_frames(decoder: Decoder) -> None:
    copy = traceable_copy(decoder, torch.float32)
    branches = [module for module in copy.modules() if isinstance(module, Branch)]
    assert len(branches) == 5 and not any(type(branch) is Branch for branch in branches)
    assert all(type(module) is Branch for module in decoder.modules() if isinstance(module, Branch))
    latents = seeded_latents(decoder.spec, (3, 2, 3), seed=1, batch=2)
    torch.testing.assert_close(ClipGraph(copy)(latents), decode(decoder, latents), atol=1e-6, rtol=0)


def test_onnx_streams_and_says_what_it_does(decoder: Decoder, tmp_path: Path) -> None:
    progress = CountingProgress()
    clip, step = export_onnx(decoder, tmp_path / "lean.onnx", progress=progress)
    latents = seeded_latents(decoder.spec, (4, 3, 2), seed=1)
    expected = decode(decoder, latents)
    assert (expected.abs() < 1).float().mean() > 0.5
    torch.testing.assert_close(OnnxDecoder(clip.path).decode(latents), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(OnnxDecoder(*step.paths).decode(latents, (1, 2, 1)), expected, atol=1e-5, rtol=0)
    assert progress.totals == progress.done == {"ONNX": 5}
    assert progress.said == ["tracing step.first", "tracing step.next", "checking clip", "checking step"]
