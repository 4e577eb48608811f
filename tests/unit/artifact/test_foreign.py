from __future__ import annotations

import json
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_specs import DECODER_SPEC, ENCODER_SPEC, filled, flash_spec, small_decoder
from safetensors.torch import save_file
from torch import Tensor

from flashvaed_cli.artifact.checkpoint import Checkpoint, load_checkpoint
from flashvaed_cli.artifact.foreign.layouts import to_foreign
from flashvaed_cli.decoders.modules.coder import Decoder, Encoder
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families.wan21.names import WAN_DIFFUSERS, WAN_ORIGINAL
from flashvaed_cli.families.wan21.spec import LATENT_MEAN, wan_decoder_spec

CONFIG = {"_class_name": "AutoencoderKLWan", "base_dim": 4, "z_dim": 16}


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return small_decoder()


@pytest.fixture(scope="module")
def original(decoder: Decoder) -> dict[str, Tensor]:
    encoder = filled(Encoder(ENCODER_SPEC))
    tensors = to_foreign(encoder.state_dict(), ENCODER_SPEC, WAN_ORIGINAL)
    return tensors | to_foreign(decoder.state_dict(), DECODER_SPEC, WAN_ORIGINAL)


@pytest.fixture(scope="module")
def diffusers(decoder: Decoder) -> dict[str, Tensor]:
    return to_foreign(decoder.state_dict(), DECODER_SPEC, WAN_DIFFUSERS)


def load(path: Path) -> Checkpoint:
    return load_checkpoint(path, builtins={})


def assert_same(checkpoint: Checkpoint, decoder: Decoder) -> None:
    found = checkpoint.require_decoder()
    assert found.spec == decoder.spec
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    for name, value in decoder.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "vae.", "first_stage_model."])
def test_pth(tmp_path: Path, original: dict[str, Tensor], decoder: Decoder, wrapper: str | None, prefix: str) -> None:
    state: Any = {prefix + name: tensor for name, tensor in original.items()}
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3, "lr": torch.tensor(0.1)}, tmp_path / "x.pth")
    checkpoint = load(tmp_path / "x.pth")
    assert_same(checkpoint, decoder)
    assert checkpoint.layout == "wan-original"
    assert checkpoint.latent_mean == LATENT_MEAN
    assert checkpoint.require_encoder().spec == ENCODER_SPEC


def test_pth_of_the_old_format(tmp_path: Path, original: dict[str, Tensor], decoder: Decoder) -> None:
    torch.save(original, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert_same(load(tmp_path / "x.pt"), decoder)


def test_weights_do_not_depend_on_the_file_any_more(tmp_path: Path, original: dict[str, Tensor]) -> None:
    path = tmp_path / "x.pth"
    torch.save(original, path)
    checkpoint = load(path)
    before = checkpoint.require_decoder().at("conv_in.0.conv").weight.clone()  # type: ignore[union-attr]
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(checkpoint.require_decoder().at("conv_in.0.conv").weight, before)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(tmp_path: Path, original: dict[str, Tensor], dtype: torch.dtype) -> None:
    save_file({name: tensor.to(dtype) for name, tensor in original.items()}, tmp_path / "x.safetensors")
    weight = load(tmp_path / "x.safetensors").require_decoder().at("conv_in.0.conv").weight
    assert isinstance(weight, Tensor) and weight.dtype == torch.float32
    assert torch.equal(weight, original["decoder.conv1.weight"].to(dtype).float())


def test_quantised_weights_are_refused(tmp_path: Path, original: dict[str, Tensor]) -> None:
    save_file({name: tensor.to(torch.int8) for name, tensor in original.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match=r"torch\.int8; quantised"):
        load(tmp_path / "x.safetensors")


class _Bomb:
    def __reduce__(self) -> tuple:
        return (subprocess.check_output, (["touch", "exploded"],))


def test_a_pickle_with_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(1), "bomb": _Bomb()}, "x.pth")
    Path("y.pth").write_bytes(pickle.dumps(_Bomb()))
    for name in ("x.pth", "y.pth"):
        with pytest.raises(ArtifactError, match=rf"{name}: not a plain file of weights.*never does"):
            load(Path(name))
    assert not Path("exploded").exists()


def test_a_pth_without_weights_is_named(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {"lr": 0.1}}, tmp_path / "x.pth")
    with pytest.raises(ArtifactError, match="holds a dict with the keys epoch, state_dict, not a state dict"):
        load(tmp_path / "x.pth")
    torch.save([torch.ones(1)], tmp_path / "x.pth")
    with pytest.raises(ArtifactError, match="holds a list, not a state dict"):
        load(tmp_path / "x.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files_are_named(tmp_path: Path, original: dict[str, Tensor], suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    torch.save(original, path) if suffix == ".pth" else save_file(original, path)
    whole = path.read_bytes()
    for length in (0, 1, 70, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match=r"x\.\w+: .*(truncated|again)"):
            load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"GGUF\x03", "GGUF"),
        (b"<!doctype html><html>" * 9, "not a safetensors file"),
    ],
)
def test_files_that_are_no_weights_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        load(tmp_path / "x.safetensors")


def write_folder(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder


def test_diffusers_folder(tmp_path: Path, diffusers: dict[str, Tensor], decoder: Decoder) -> None:
    mean, std = [0.5] * 16, [2.0] * 16
    folder = write_folder(tmp_path / "vae", diffusers, latents_mean=mean, latents_std=std)
    # The folder, the pipeline around it, and the file beside its config.
    for location in (folder, tmp_path, folder / "diffusion_pytorch_model.safetensors"):
        checkpoint = load(location)
        assert_same(checkpoint, decoder)
        assert checkpoint.layout == "diffusers"
        assert checkpoint.encoder is None
        assert (checkpoint.latent_mean, checkpoint.latent_std) == (tuple(mean), tuple(std))
        with pytest.raises(ArtifactError, match=r"no encoder.*--original"):
            checkpoint.require_encoder()
    before = load(folder).sha256
    write_folder(folder, diffusers, latents_mean=std, latents_std=std)
    assert load(folder).sha256 != before


def test_diffusers_file_alone_has_the_familys_statistics(
    tmp_path: Path, diffusers: dict[str, Tensor], decoder: Decoder
) -> None:
    save_file(diffusers, tmp_path / "x.safetensors")
    assert_same(load(tmp_path / "x.safetensors"), decoder)
    assert load(tmp_path / "x.safetensors").latent_mean == LATENT_MEAN


def test_statistics_in_the_metadata(tmp_path: Path, diffusers: dict[str, Tensor]) -> None:
    metadata = {"latents_mean": json.dumps([1.0] * 16), "latents_std": json.dumps([3.0] * 16)}
    save_file(diffusers, tmp_path / "x.safetensors", metadata=metadata)
    assert load(tmp_path / "x.safetensors").latent_std == (3.0,) * 16
    save_file(diffusers, tmp_path / "x.safetensors", metadata=metadata | {"latents_std": "wide"})
    with pytest.raises(ArtifactError, match="latents_std in its metadata"):
        load(tmp_path / "x.safetensors")


def test_statistics_that_do_not_fit_are_named(tmp_path: Path, diffusers: dict[str, Tensor]) -> None:
    for std in ([1.0] * 8, [0.0] * 16):
        write_folder(tmp_path, diffusers, latents_mean=[0.0] * 16, latents_std=std)
        with pytest.raises(ArtifactError, match=r"latents_std of config\.json"):
            load(tmp_path)
    narrow = wan_decoder_spec(4, latent_width=8)
    save_file(to_foreign(small_decoder(narrow).state_dict(), narrow, WAN_DIFFUSERS), tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match=r"16 and 16 figures; expected 8"):
        load(tmp_path / "x.safetensors")


def test_sharded_folder(tmp_path: Path, diffusers: dict[str, Tensor], decoder: Decoder) -> None:
    names = list(diffusers)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: diffusers[name] for name in held}, tmp_path / shard)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(load(tmp_path), decoder)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"not there: b\.safetensors"):
        load(tmp_path)


def test_widths_are_checked_against_the_config(tmp_path: Path, diffusers: dict[str, Tensor]) -> None:
    load(write_folder(tmp_path, diffusers, base_dim=96, decoder_base_dim=4))
    write_folder(tmp_path, diffusers, base_dim=4, decoder_base_dim=8)
    with pytest.raises(ArtifactError, match=r"decoder_base_dim 8, so 16 -> 32 channels in decoder conv_in.*16 -> 16"):
        load(tmp_path)
    load(tmp_path / "diffusion_pytorch_model.safetensors")  # the way out: the weights alone
    flash = to_foreign(small_decoder(flash_spec()).state_dict(), flash_spec(), WAN_DIFFUSERS)
    with pytest.raises(ArtifactError, match=r"channels in decoder up1\.3"):
        load(write_folder(tmp_path, flash))


def test_folders_that_are_no_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"without config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"a\.safetensors, b\.safetensors"):
        load(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ArtifactError, match="truncated"):
        load(tmp_path)
