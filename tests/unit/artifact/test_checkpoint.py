from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from artifact_specs import DECODER_SPEC, ENCODER_SPEC, filled, flash_spec, header, small_decoder
from safetensors.torch import load_file, save_file

from flashvaed_cli.artifact.checkpoint import (
    Checkpoint,
    derived_header,
    load_checkpoint,
    save_checkpoint,
)
from flashvaed_cli.artifact.original import load_original
from flashvaed_cli.artifact.store import read_artifact, write_artifact
from flashvaed_cli.decoders.modules.coder import Encoder
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families.wan21.spec import wan_decoder_spec


@pytest.fixture
def vae(tmp_path: Path) -> Checkpoint:
    """An original: a whole VAE as an artifact."""
    encoder = Encoder(ENCODER_SPEC)
    filled(encoder)
    path = tmp_path / "vae.safetensors"
    sha256 = save_checkpoint(path, header(), decoder=small_decoder(), encoder=encoder)
    loaded = load_checkpoint(path, builtins={})
    assert loaded.sha256 == sha256
    return loaded


def save_student(vae: Checkpoint, path: Path) -> Checkpoint:
    made = derived_header(
        vae,
        recipe={"keep_ratio": 0.25},
        command_line="flashvaed prune",
        seed=1,
        kept_channels={"up2.0": [0, 1, 2, 4, 5, 7]},
        measured={"relative_error": 0.1},
    )
    save_checkpoint(path, made, decoder=small_decoder(flash_spec()))
    return load_checkpoint(path, builtins={})


def test_a_vae_round_trips(vae: Checkpoint) -> None:
    assert vae.header is not None and vae.header.kind == "vae"
    assert vae.layout == "flashvaed"
    assert vae.require_decoder().spec == DECODER_SPEC
    assert vae.require_encoder().spec == ENCODER_SPEC
    assert not vae.require_encoder().training


def test_a_student_round_trips_and_remembers(vae: Checkpoint, tmp_path: Path) -> None:
    decoder = small_decoder(flash_spec())
    made = derived_header(vae, kept_channels={"up2.0": [0, 1, 2, 4, 5, 7]}, seed=1)
    save_checkpoint(tmp_path / "s.safetensors", made, decoder=decoder)
    student = load_checkpoint(tmp_path / "s.safetensors", builtins={})
    assert student.require_decoder().spec == flash_spec()
    for name, value in decoder.state_dict().items():
        assert torch.equal(student.require_decoder().state_dict()[name], value)
    assert student.kept_channels == {"up2.0": (0, 1, 2, 4, 5, 7)}
    assert student.header is not None
    assert student.header.kind == "decoder"
    assert student.header.original == vae.lineage("original")
    assert student.header.parents == (vae.lineage("decoder"),)
    again = derived_header(student)
    assert again.original == vae.lineage("original")
    assert again.parents == (student.lineage("decoder"),)
    assert again.kept_channels == student.kept_channels


def test_float16_halves_the_file_and_loads_as_float32(vae: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_checkpoint(path, header(), decoder=vae.require_decoder(), dtype=torch.float16)
    assert {tensor.dtype for tensor in read_artifact(path)[1].values()} == {torch.float16}
    decoder = load_checkpoint(path, builtins={}).require_decoder()
    assert {p.dtype for p in decoder.parameters()} == {torch.float32}


def test_what_does_not_fit_the_dtype_is_not_written(tmp_path: Path) -> None:
    decoder = small_decoder()
    decoder.at("head.0.conv").weight[0, 0, 0, 0, 0] = 1e5  # type: ignore[index]
    with pytest.raises(ArtifactError, match=r"decoder\.stages\.head\.0\.conv\.weight overflows in torch\.float16"):
        save_checkpoint(tmp_path / "x.safetensors", header(), decoder=decoder, dtype=torch.float16)
    decoder.at("head.0.conv").weight[0, 0, 0, 0, 0] = torch.nan  # type: ignore[index]
    with pytest.raises(ArtifactError, match="is not finite"):
        save_checkpoint(tmp_path / "x.safetensors", header(), decoder=decoder)
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_do_not_fit_the_spec_are_named(vae: Checkpoint) -> None:
    path = Path(vae.location)
    made, tensors = read_artifact(path)
    tensors["decoder.stages.head.0.conv.bias"] = torch.zeros(4)
    tensors["decoder.extra"] = tensors.pop("encoder.stages.quant.0.conv.bias")
    write_artifact(path, tensors, made)
    with pytest.raises(ArtifactError) as caught:
        load_checkpoint(path, builtins={})
    text = str(caught.value)
    assert "1 missing: encoder.stages.quant.0.conv.bias" in text
    assert "1 unexpected: decoder.extra" in text
    assert "decoder.stages.head.0.conv.bias (expected [3], found [4])" in text


def test_an_analysis_is_no_checkpoint(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a.safetensors", {"gram": torch.eye(2)}, header(kind="analysis"))
    with pytest.raises(ArtifactError, match=r"an analysis.*--analysis"):
        load_checkpoint(tmp_path / "a.safetensors", builtins={})


def test_builtins_and_places_that_are_not_there(vae: Checkpoint, tmp_path: Path) -> None:
    builtins = {"tiny-wan": Path(vae.location)}
    found = load_checkpoint("builtin:tiny-wan", builtins=builtins)
    assert (found.location, found.sha256) == ("builtin:tiny-wan", vae.sha256)
    with pytest.raises(ArtifactError, match="builtin:big: no such builtin; this version ships: builtin:tiny-wan"):
        load_checkpoint("builtin:big", builtins=builtins)
    with pytest.raises(ArtifactError, match=r"no such file or folder\. Near it: .*vae\.safetensors.*builtin:tiny-wan"):
        load_checkpoint(tmp_path / "vea.safetensors", builtins=builtins)


def test_the_original_of_an_original_is_itself(vae: Checkpoint, tmp_path: Path) -> None:
    assert load_original(vae, None, {}) is vae
    save_checkpoint(tmp_path / "d.safetensors", header(), decoder=vae.require_decoder())
    alone = load_checkpoint(tmp_path / "d.safetensors", builtins={})
    assert load_original(alone, None, {}, needs_encoder=False) is alone
    with pytest.raises(ArtifactError, match=r"no encoder.*--original"):
        load_original(alone, None, {})
    assert load_original(alone, vae.location, {}).encoder is not None


def test_the_original_is_found_and_verified(vae: Checkpoint, tmp_path: Path) -> None:
    student = save_student(vae, tmp_path / "student.safetensors")
    assert load_original(student, None, {}).sha256 == vae.sha256
    moved = Path(vae.location).rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ArtifactError, match=rf"SHA-256 {vae.sha256}\) cannot be loaded[\s\S]*--original"):
        load_original(student, None, {})
    assert load_original(student, str(moved), {}).sha256 == vae.sha256
    tensors = load_file(moved)
    save_file(tensors, moved, metadata={"note": "rewritten"})
    with pytest.raises(ArtifactError):
        load_original(student, str(moved), {})


def test_another_file_is_not_the_original(vae: Checkpoint, tmp_path: Path) -> None:
    student = save_student(vae, tmp_path / "student.safetensors")
    other = tmp_path / "other.safetensors"
    sha256 = save_checkpoint(other, header(), decoder=small_decoder(), encoder=vae.require_encoder())
    with pytest.raises(ArtifactError, match=rf"expected SHA-256 {vae.sha256}.*found {sha256}.*--original"):
        load_original(student, str(other), {})
    other.rename(vae.location)
    with pytest.raises(ArtifactError, match=rf"expected SHA-256 {vae.sha256}.*found {sha256}"):
        load_original(student, None, {})


def test_an_original_that_moved_with_its_student_is_found(
    vae: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = save_student(replace(vae, location="vae.safetensors"), tmp_path / "student.safetensors")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert load_original(student, None, {}).sha256 == vae.sha256


def test_another_latent_space_is_refused(vae: Checkpoint) -> None:
    student = replace(vae, header=None, decoder=small_decoder(wan_decoder_spec(4, 8)))
    with pytest.raises(ArtifactError, match=r"16 latent channels.*has 8"):
        load_original(student, vae.location, {})
