"""Exports that several tests look at, traced once."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_decoders import low_rank_spec, small_decoder

from flashvaed_cli.decoders.coder import Decoder
from flashvaed_cli.export.onnx_graph import OnnxOptions, export_onnx_clip, export_onnx_step
from flashvaed_cli.export.result import ExportResult


@pytest.fixture(scope="session")
def flash_decoder() -> Decoder:
    return small_decoder(low_rank_spec())


@pytest.fixture(scope="session")
def latent_statistics() -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(0.1 * i for i in range(16)), tuple(1.0 + 0.1 * i for i in range(16))


@pytest.fixture(scope="session")
def clip_export(
    flash_decoder: Decoder,
    latent_statistics: tuple[tuple[float, ...], tuple[float, ...]],
    tmp_path_factory: pytest.TempPathFactory,
) -> ExportResult:
    mean, std = latent_statistics
    path: Path = tmp_path_factory.mktemp("clip") / "decoder.onnx"
    options = OnnxOptions(latent_mean=mean, latent_std=std, speed_grid=(2, 2, 2))
    return export_onnx_clip(flash_decoder, path, options=options, metadata={"parent": "a hash"})


@pytest.fixture(scope="session")
def step_export(flash_decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    return export_onnx_step(flash_decoder, tmp_path_factory.mktemp("step") / "decoder.onnx")
