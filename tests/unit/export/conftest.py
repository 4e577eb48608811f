"""Exports that several tests look at, traced once."""

from __future__ import annotations

import pytest
from small_decoders import low_rank_spec, small_decoder

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.export.onnx_graph import OnnxOptions, export_onnx
from flashvaed_cli.export.result import ExportResult


@pytest.fixture(scope="session")
def flash_decoder() -> Decoder:
    return small_decoder(low_rank_spec())


@pytest.fixture(scope="session")
def latent_statistics() -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(0.1 * i for i in range(16)), tuple(1.0 + 0.1 * i for i in range(16))


@pytest.fixture(scope="session")
def onnx_exports(
    flash_decoder: Decoder,
    latent_statistics: tuple[tuple[float, ...], tuple[float, ...]],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[ExportResult]:
    mean, std = latent_statistics
    path = tmp_path_factory.mktemp("onnx") / "decoder.onnx"
    options = OnnxOptions(latent_mean=mean, latent_std=std, speed_grid=(2, 2, 2))
    return export_onnx(flash_decoder, path, options=options, metadata={"parent": "a hash"})


@pytest.fixture(scope="session")
def clip_export(onnx_exports: list[ExportResult]) -> ExportResult:
    return onnx_exports[0]


@pytest.fixture(scope="session")
def step_export(onnx_exports: list[ExportResult]) -> ExportResult:
    return onnx_exports[1]
