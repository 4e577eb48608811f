from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.errors import ExportError
from flashvaed_cli.export.checkpoint_file import Reference, export_diffusers, export_safetensors
from flashvaed_cli.export.parity import seeded_latents


def _reload(decoder: Decoder, path: Path) -> Decoder:
    """The layout of these tests: our own names with a prefix."""
    read = Decoder(decoder.spec)
    read.load_state_dict({name.removeprefix("vae."): tensor for name, tensor in load_file(path).items()})
    return read


def _translated(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {f"vae.{name}": tensor for name, tensor in decoder.state_dict().items()}


def _reference(decoder: Decoder, grid: tuple[int, int, int] = (2, 3, 3)) -> Reference:
    return Reference(decoder, seeded_latents(decoder.spec, grid), lambda path: _reload(decoder, path))


def test_float32_comes_back_the_same(flash_decoder: Decoder, tmp_path: Path) -> None:
    result = export_safetensors(
        _translated(flash_decoder),
        tmp_path / "vae.safetensors",
        {"format": "pt"},
        reference=_reference(flash_decoder),
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
        _translated(flash_decoder),
        tmp_path / "vae.safetensors",
        {},
        reference=_reference(flash_decoder),
        dtype=dtype,
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
            reference=_reference(flash_decoder),
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
            reference=replace(_reference(flash_decoder), reload=refuse),
        )
    assert list(tmp_path.iterdir()) == []


def test_weights_that_the_format_cannot_hold(flash_decoder: Decoder, tmp_path: Path) -> None:
    tensors = {**_translated(flash_decoder), "large": torch.full((2,), 1e5)}
    for dtype, message in ((torch.float16, "large overflows in float16"), (torch.int64, "bfloat16, not int64")):
        with pytest.raises(ExportError, match=message):
            export_safetensors(tensors, tmp_path / "a.sft", {}, reference=_reference(flash_decoder), dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_some_tensors_keep_their_digits(flash_decoder: Decoder, tmp_path: Path) -> None:
    tensors = {**_translated(flash_decoder), "mean": torch.tensor([0.1])}
    export_safetensors(
        tensors,
        tmp_path / "a.sft",
        {},
        reference=replace(_reference(flash_decoder), reload=lambda _: flash_decoder),
        dtype=torch.float16,
        exact=frozenset({"mean"}),
    )
    assert torch.equal(load_file(tmp_path / "a.sft")["mean"], torch.tensor([0.1]))


def test_a_folder_is_whole_or_not_there(flash_decoder: Decoder, tmp_path: Path) -> None:
    def reload(folder: Path) -> Decoder:
        assert json.loads((folder / "config.json").read_text()) == {"_class_name": "Any"}
        return _reload(flash_decoder, folder / "diffusion_pytorch_model.safetensors")

    reference, tensors = replace(_reference(flash_decoder), reload=reload), _translated(flash_decoder)
    result = export_diffusers(tensors, {"_class_name": "Any"}, tmp_path / "d", reference=reference)
    assert result.max_abs_difference == 0.0
    assert {path.name for path in result.paths} == {path.name for path in (tmp_path / "d").iterdir()}
    tensors["vae.stages.head.0.conv.bias"] = tensors["vae.stages.head.0.conv.bias"] + 1e-3
    with pytest.raises(ExportError, match="e/, read back, differs"):
        export_diffusers(tensors, {"_class_name": "Any"}, tmp_path / "e", reference=reference)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_views_of_one_storage_are_written_as_tensors_of_their_own(flash_decoder: Decoder, tmp_path: Path) -> None:
    pair = torch.arange(6.0).view(2, 3)
    tensors = {**_translated(flash_decoder), "first": pair[0], "all": pair.T}
    result = export_safetensors(
        tensors,
        tmp_path / "vae.safetensors",
        {},
        reference=replace(_reference(flash_decoder), reload=lambda _: flash_decoder),
    )
    assert torch.equal(load_file(result.path)["all"], pair.T)
