from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from flashvaed_cli.decoders.coder import Decoder
from flashvaed_cli.errors import ExportError
from flashvaed_cli.export.checkpoint_file import export_safetensors
from flashvaed_cli.export.parity import seeded_latents


def _reload(decoder: Decoder, path: Path) -> Decoder:
    """The layout of these tests: our own names with a prefix."""
    read = Decoder(decoder.spec)
    read.load_state_dict({name.removeprefix("vae."): tensor for name, tensor in load_file(path).items()})
    return read


def _translated(decoder: Decoder, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {f"vae.{name}": tensor.to(dtype) for name, tensor in decoder.state_dict().items()}


def test_float32_comes_back_the_same(flash_decoder: Decoder, tmp_path: Path) -> None:
    result = export_safetensors(
        _translated(flash_decoder),
        tmp_path / "vae.safetensors",
        {"format": "pt"},
        reload=lambda path: _reload(flash_decoder, path),
        decoder=flash_decoder,
        latents=seeded_latents(flash_decoder.spec, (2, 3, 3)),
        notes=("fits here",),
    )
    assert result.max_abs_difference == 0.0
    assert result.size_bytes == result.path.stat().st_size
    assert result.notes == ("fits here",)
    with safe_open(result.path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_comes_back_within_its_tolerance(flash_decoder: Decoder, tmp_path: Path, dtype: torch.dtype) -> None:
    result = export_safetensors(
        _translated(flash_decoder, dtype),
        tmp_path / "vae.safetensors",
        {},
        reload=lambda path: _reload(flash_decoder, path),
        decoder=flash_decoder,
        latents=seeded_latents(flash_decoder.spec, (2, 3, 3)),
    )
    assert 0.0 < result.max_abs_difference <= result.tolerance
    assert all(tensor.dtype == dtype for tensor in load_file(result.path).values())


def test_file_that_reads_back_otherwise_is_not_left(flash_decoder: Decoder, tmp_path: Path) -> None:
    tensors = _translated(flash_decoder)
    tensors["vae.stages.head.0.conv.bias"] = tensors["vae.stages.head.0.conv.bias"] + 1e-3
    with pytest.raises(ExportError, match=r"vae\.safetensors, read back, differs"):
        export_safetensors(
            tensors,
            tmp_path / "vae.safetensors",
            {},
            reload=lambda path: _reload(flash_decoder, path),
            decoder=flash_decoder,
            latents=seeded_latents(flash_decoder.spec, (1, 3, 3)),
        )
    assert list(tmp_path.iterdir()) == []


def test_error_of_the_reader_leaves_no_file(flash_decoder: Decoder, tmp_path: Path) -> None:
    def refuse(path: Path) -> Decoder:
        raise ExportError("unknown layout")

    with pytest.raises(ExportError, match="unknown layout"):
        export_safetensors(
            _translated(flash_decoder),
            tmp_path / "vae.safetensors",
            {},
            reload=refuse,
            decoder=flash_decoder,
            latents=seeded_latents(flash_decoder.spec, (1, 2, 2)),
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"a": torch.zeros(2), "b": torch.zeros(2).half()}, "float16, float32"),
        ({"a": torch.zeros(2, dtype=torch.int64)}, "int64"),
        ({}, "no tensor"),
    ],
)
def test_dtypes_that_a_checkpoint_cannot_hold(
    flash_decoder: Decoder, tmp_path: Path, tensors: dict[str, torch.Tensor], found: str
) -> None:
    with pytest.raises(ExportError, match=found):
        export_safetensors(
            tensors,
            tmp_path / "vae.safetensors",
            {},
            reload=lambda _: flash_decoder,
            decoder=flash_decoder,
            latents=seeded_latents(flash_decoder.spec, (1, 2, 2)),
        )


def test_views_of_one_storage_are_written_as_tensors_of_their_own(flash_decoder: Decoder, tmp_path: Path) -> None:
    pair = torch.arange(6.0).view(2, 3)
    tensors = {**_translated(flash_decoder), "first": pair[0], "all": pair.T}
    result = export_safetensors(
        tensors,
        tmp_path / "vae.safetensors",
        {},
        reload=lambda _: flash_decoder,
        decoder=flash_decoder,
        latents=seeded_latents(flash_decoder.spec, (1, 2, 2)),
    )
    assert torch.equal(load_file(result.path)["all"], pair.T)
