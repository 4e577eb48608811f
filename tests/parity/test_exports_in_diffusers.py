"""What `export` writes, loaded by diffusers itself: weights, statistics and frames of the model it came from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import randomised, share_of_range
from torch import Tensor, nn

from flashvaed_cli.artifact.checkpoint import derived_header, load_checkpoint, save_checkpoint
from flashvaed_cli.artifact.foreign.writing import to_program
from flashvaed_cli.decoders.modules.coder import Decoder, Encoder
from flashvaed_cli.errors import FlashVaedError
from flashvaed_cli.export.diffusers_config import ARGUMENTS, diffusers_config
from flashvaed_cli.families.registry import get_family, original_layout
from flashvaed_cli.surgery.respec import converted_spec
from tests.commands import succeed
from tests.ltx_configs import FAMILIES, ltx_config, random_ltx
from tests.toy import fill_

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle; pip install '.[dev]'")
FRAMES_BOUND = 1e-5  # of the range: 0 for the same weights, 2e-6 where a folded condition is rounded once more

FLASH_BOUND = 2e-4  # as in tests/integration/test_diffusers_pipelines.py


def wan(**widths: Any) -> nn.Module:
    return randomised(diffusers.AutoencoderKLWan(**widths))


def wan22() -> nn.Module:
    patched = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.5, 1.0, 2.0]}
    return wan(base_dim=4, decoder_base_dim=8, z_dim=4, **patched, **statistics)


def qwen2() -> nn.Module:
    statistics = {"latents_mean": [0.1] * 8, "latents_std": [1.5] * 8}
    return randomised(diffusers.AutoencoderKLQwenImage21(base_dim=4, decoder_base_dim=8, z_dim=8, **statistics))


def ltx(version: str, **changes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        oracle = random_ltx(ltx_config(version, 4, 4, **changes))
        for name, parameter in oracle.named_parameters():
            if "per_channel_scale" in name:
                parameter.zero_()  # the noise is the only thing that is left to chance
        return oracle

    return build


ORACLES: dict[str, Callable[[], nn.Module]] = {
    "wan2.1": lambda: wan(base_dim=4, decoder_base_dim=8),
    "wan2.2": wan22,
    "qwen-image": lambda: randomised(diffusers.AutoencoderKLQwenImage(base_dim=4)),
    "qwen-image-2": qwen2,
    "ltx-video-0.9.0": ltx("0.9.0"),
    "ltx-video-0.9.1": ltx("0.9.1"),
    "ltx-video-0.9.5": ltx("0.9.5", decoder_causal=True),
    "ltx-2": ltx("2", decoder_causal=False),
    "ltx-2.3": ltx("2.3", decoder_causal=False),
}
SINGLE_FILES = ("wan2.1", "ltx-video-0.9.0", "ltx-video-0.9.1", "ltx-2")


@dataclass
class Exported:
    """A family's toy in diffusers, and the folder into which `export` wrote it again."""

    oracle: nn.Module
    folder: Path
    printed: dict[str, Any]
    name: str = "vae.safetensors"

    @property
    def original(self) -> Path:
        return self.folder / self.name

    def loaded(self) -> nn.Module:
        return type(self.oracle).from_pretrained(self.folder / "diffusers")  # type: ignore[operator]

    def loaded_from_single_file(self) -> nn.Module:
        config = str(self.folder / "diffusers")
        return type(self.oracle).from_single_file(str(self.original), config=config)  # type: ignore[operator]


@pytest.fixture(scope="module", params=ORACLES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    if request.param == "qwen-image-2" and not hasattr(diffusers, "AutoencoderKLQwenImage21"):
        pytest.skip("this diffusers has no Qwen-Image 2")
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    oracle = ORACLES[request.param]()
    oracle.save_pretrained(folder / "vae")  # type: ignore[operator]
    printed = succeed("export vae --target safetensors --target diffusers", cwd=folder)
    return Exported(oracle, folder / "export", printed)


def family_of(exported: Exported) -> str:
    return load_checkpoint(exported.original, builtins={}).family


def statistics_of(vae: nn.Module) -> list[list[float]]:
    """Where the pipelines read them: the buffers of LTX, else the configuration."""
    buffers = dict(vae.named_buffers())
    return [
        buffers[name].tolist() if name in buffers else list(vae.config[name])  # type: ignore[index]
        for name in ("latents_mean", "latents_std")
    ]


@torch.no_grad()
def frames_of(vae: nn.Module, latents: Tensor, timestep: float = 0.05) -> Tensor:
    conditioned = vae.config.get("timestep_conditioning", False)  # type: ignore[union-attr]
    given = (latents, torch.tensor([timestep])) if conditioned else (latents,)
    return vae.decode(*given).sample[:, :3]  # type: ignore[operator]


def latents_for(vae: nn.Module) -> Tensor:
    config: Any = vae.config
    width = config.get("z_dim") or config["latent_channels"]
    num_latents = 1 if "Image" in type(vae).__name__ else 3
    return torch.randn(1, width, num_latents, 3, 4, generator=torch.Generator().manual_seed(1))


def assert_same(found: nn.Module, exported: Exported) -> None:
    oracle, latents = exported.oracle, latents_for(exported.oracle)
    assert statistics_of(found) == statistics_of(oracle)
    expected = oracle.encoder.state_dict()  # type: ignore[union-attr]
    unreached = ".time_conv." if "QwenImage21" in type(oracle).__name__ else "\n"  # by single images
    for name, tensor in found.encoder.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(tensor, expected[name]) or unreached in name, name
    error = share_of_range(frames_of(found, latents), frames_of(oracle, latents))
    print(f"{type(oracle).__name__}: {error:.1e} of the range")
    assert error <= FRAMES_BOUND


def test_from_pretrained(exported: Exported, caplog: pytest.LogCaptureFixture) -> None:
    name = type(exported.oracle).__name__
    assert f"diffusers: {name}.from_pretrained loads the folder, encoder included" in exported.printed["notes"]
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        found = exported.loaded()
    assert not caplog.records  # no key and no tensor is unknown, and none is missing
    assert_same(found, exported)


def test_from_single_file(exported: Exported, request: pytest.FixtureRequest) -> None:
    family, name = family_of(exported), type(exported.oracle).__name__
    note = next(note for note in exported.printed["notes"] if note.startswith("safetensors: "))
    if family in SINGLE_FILES:
        assert note == f"safetensors: {name}.from_single_file loads it, with config= the folder of -t diffusers"
        assert_same(exported.loaded_from_single_file(), exported)
        return
    assert "give it the folder of -t diffusers" in note
    with pytest.raises((ValueError, KeyError, RuntimeError, NotImplementedError)):
        assert_same(exported.loaded_from_single_file(), exported)


def test_the_condition_on_the_timestep_is_gone(exported: Exported) -> None:
    if not exported.oracle.config.get("timestep_conditioning"):  # type: ignore[union-attr]
        return
    latents, found = latents_for(exported.oracle), exported.loaded()
    assert torch.equal(frames_of(found, latents, 0.05), frames_of(found, latents, 0.9))
    assert not torch.allclose(frames_of(exported.oracle, latents, 0.05), frames_of(exported.oracle, latents, 0.9))


def test_both_are_read_again(exported: Exported) -> None:
    vae, *found = (
        load_checkpoint(path, builtins={})
        for path in (exported.folder.parent / "vae", exported.original, exported.folder / "diffusers")
    )
    for again in found:
        assert again.require_decoder().spec == vae.require_decoder().spec
        assert again.require_encoder().spec == vae.require_encoder().spec
        assert (again.latent_mean, again.latent_std) == (vae.latent_mean, vae.latent_std)


def test_half_precision_keeps_the_statistics(tmp_path: Path) -> None:
    oracle = ORACLES["ltx-video-0.9.0"]()
    oracle.save_pretrained(tmp_path / "vae")  # type: ignore[operator]
    succeed("export vae -t safetensors -t diffusers --dtype bfloat16", cwd=tmp_path)
    for place in ("export/vae.safetensors", "export/diffusers"):
        found = load_checkpoint(tmp_path / place, builtins={})
        assert [list(found.latent_mean), list(found.latent_std)] == statistics_of(oracle)
    assert statistics_of(type(oracle).from_pretrained(tmp_path / "export" / "diffusers")) == statistics_of(oracle)  # type: ignore[operator]


@pytest.mark.parametrize("version", FAMILIES)
def test_names_at_released_widths(version: str) -> None:
    """0.9.5 is told by an encoder of 2048 channels: too large for a test but on the meta device."""
    from diffusers.loaders import single_file_utils

    family = get_family(FAMILIES[version])
    with torch.device("meta"):
        coders = Decoder(family.decoder_spec(128, 128)), Encoder(family.encoder_spec(128, 128))
        parts = [(coder.state_dict(), coder.spec) for coder in coders]
        tensors = to_program(parts, original_layout(family.name), ((0.0,) * 128, (1.0,) * 128))
        is_second = version.startswith("2")
        convert = single_file_utils.convert_ltx_vae_checkpoint_to_diffusers
        if is_second:
            convert = single_file_utils.convert_ltx2_vae_to_diffusers
        name = "AutoencoderKLLTX2Video" if is_second else "AutoencoderKLLTXVideo"
        config = diffusers_config(name, coders[0].spec, coders[1].spec, ((0.0,) * 128, (1.0,) * 128))
        expected = getattr(diffusers, name).from_config(config).state_dict()
    shapes = {key: tuple(value.shape) for key, value in expected.items()}
    found = {key: tuple(value.shape) for key, value in convert(dict(tensors)).items()}
    assert (found == shapes) == family.elsewhere.reads_single_file
    released = ltx_config(version, 128)
    said = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    assert {key: said[key] for key in released} == released


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_is_one_of_the_class(name: str) -> None:
    import inspect

    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    assert set(ARGUMENTS[name]) <= set(inspect.signature(getattr(diffusers, name)).parameters)


def student(folder: Path, family: str, base_width: int) -> None:
    """A decoder-only artifact of the original's topology at another width, made from the folder `vae`."""
    parent = load_checkpoint(folder / "vae", builtins={})
    spec = get_family(family).decoder_spec(base_width, parent.latent_width)
    decoder = Decoder(spec).eval().requires_grad_(False)
    fill_(decoder)
    save_checkpoint(folder / "flash.safetensors", derived_header(parent), decoder=decoder)


@pytest.mark.parametrize("family", ["wan2.1", "ltx-video-0.9.0"])
def test_the_encoder_of_the_original_goes_along(family: str, tmp_path: Path) -> None:
    oracle = ORACLES[family]()
    oracle.save_pretrained(tmp_path / "vae")  # type: ignore[operator]
    student(tmp_path, family, 12)
    printed = succeed(f"export '{tmp_path}/flash.safetensors' -t safetensors -t diffusers -o out", cwd=tmp_path)
    assert any("wants an encoder in the file" in note for note in printed["notes"])
    single = Exported(oracle, tmp_path / "out", printed, "flash.safetensors")
    with pytest.raises((KeyError, NotImplementedError)):
        single.loaded_from_single_file().to("cpu", torch.float64)
    found = type(oracle).from_pretrained(tmp_path / "out" / "diffusers")  # type: ignore[operator]
    for name, tensor in oracle.encoder.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(found.encoder.state_dict()[name], tensor), name
    ours = load_checkpoint(tmp_path / "flash.safetensors", builtins={}).require_decoder()
    latents = latents_for(oracle)
    assert share_of_range(frames_of(found, latents).clamp(-1, 1), ours(latents).clamp(-1, 1)) <= 1e-5


@torch.no_grad()
def assert_flash_folder(place: Path, artifact: Path, oracle: nn.Module, *, has_encoder: bool) -> None:
    """The folder loads as `AutoencoderFlash`, with the artifact's frames and nothing on the meta device."""
    latents = latents_for(oracle)
    expected = load_checkpoint(artifact, builtins={}).require_decoder()(latents).clamp(-1, 1)
    found = diffusers.AutoModel.from_pretrained(str(place), trust_remote_code=True)
    assert type(found).__name__ == "AutoencoderFlash"
    assert not any(tensor.is_meta for tensor in (*found.parameters(), *found.buffers()))
    assert share_of_range(found.to("cpu").decode(latents).sample, expected) <= FLASH_BOUND
    assert statistics_of(found.base if "latents_mean" in dict(oracle.named_buffers()) else found) == statistics_of(
        oracle
    )
    ours = load_checkpoint(place, builtins={})
    assert (ours.encoder is not None) == has_encoder
    assert share_of_range(ours.require_decoder()(latents).clamp(-1, 1), expected) <= FLASH_BOUND
    pixels = torch.rand(1, 3, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    if has_encoder:
        assert torch.equal(found.encode(pixels).latent_dist.mode(), oracle.encode(pixels).latent_dist.mode())  # type: ignore[operator]
    else:
        with pytest.raises(FlashVaedError, match="a decoder but no encoder"):
            found.encode(pixels)


def test_what_has_no_place_in_the_class_goes_into_ours(tmp_path: Path) -> None:
    oracle = ORACLES["qwen-image"]()
    oracle.save_pretrained(tmp_path / "vae")  # type: ignore[operator]
    student(tmp_path, "qwen-image", 8)
    printed = succeed("export -t diffusers", cwd=tmp_path)
    assert any("loads it as AutoencoderFlash" in note and "encoder included" in note for note in printed["notes"])
    assert_flash_folder(tmp_path / "export" / "diffusers", tmp_path / "flash.safetensors", oracle, has_encoder=True)

    (tmp_path / "vae").rename(tmp_path / "elsewhere")
    printed = succeed("export -t diffusers", cwd=tmp_path)
    assert any("it decodes only: no encoder is at hand" in note for note in printed["notes"])
    assert_flash_folder(tmp_path / "export" / "diffusers", tmp_path / "flash.safetensors", oracle, has_encoder=False)


@pytest.mark.parametrize("family", ["wan2.1", "wan2.2", "ltx-video-0.9.1", "ltx-2"])
def test_flash_decoders(family: str, tmp_path: Path) -> None:
    oracle = ORACLES[family]()
    oracle.save_pretrained(tmp_path / "vae")  # type: ignore[operator]
    parent = load_checkpoint(tmp_path / "vae", builtins={})
    spec = converted_spec(parent.require_decoder().spec, get_family(parent.family).paper_operators)
    decoder = Decoder(spec).eval().requires_grad_(False)
    fill_(decoder)
    save_checkpoint(tmp_path / "flash.safetensors", derived_header(parent), decoder=decoder)
    printed = succeed("export -t diffusers", cwd=tmp_path)
    assert set(printed["paths"]) >= {f"export/diffusers/{name}" for name in ("config.json", "flash_vae.py")}
    assert_flash_folder(tmp_path / "export" / "diffusers", tmp_path / "flash.safetensors", oracle, has_encoder=True)
