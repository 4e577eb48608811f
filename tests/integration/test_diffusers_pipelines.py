"""`accelerate` in diffusers' own pipelines, of tiny random parts and through their own calls."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flashvaed_cli as flashvaed
from flashvaed_cli.artifact.checkpoint import derived_header, load_checkpoint, save_checkpoint
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.errors import FlashVaedError, SpecError
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.surgery.respec import converted_spec, narrowed_spec
from tests.toy import fill_, kept_of

diffusers = pytest.importorskip("diffusers", reason="its pipelines are run; pip install '.[dev]'")
pytest.importorskip("transformers", reason="text encoders of diffusers' pipelines; pip install '.[dev]'")

from flashvaed_cli.api.diffusers_vae import AutoencoderFlash  # noqa: E402
from tests.pipelines import CASES, Case  # noqa: E402

BOUND = 1e-5  # of the range; up to 6.2e-6 was seen: exact operators sum in another order
FLASH_BOUND = (
    2e-4  # norms over three random channels meet vectors near zero, where rounding grows; up to 5.2e-5 was seen
)


def flash_of(vae: nn.Module, folder: Path) -> Path:
    """An artifact made from a pipeline's VAE: three quarters of the shallow channels, the paper's operators."""
    vae.save_pretrained(folder / "original")  # type: ignore[operator]
    parent = load_checkpoint(folder / "original", builtins={})
    family, spec = get_family(parent.family), parent.require_decoder().spec
    narrow = narrowed_spec(spec, kept_of(spec, family.shallow_stages))
    decoder = Decoder(converted_spec(narrow, family.paper_operators)).eval().requires_grad_(False)
    fill_(decoder)
    save_checkpoint(folder / "flash.safetensors", derived_header(parent), decoder=decoder)
    return folder / "flash.safetensors"


def recorded(vae: Any) -> list[Tensor]:
    """The latents that a pipeline will decode."""
    seen: list[Tensor] = []
    own: Callable[..., Any] = vae.decode

    def decode_and_keep(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(z)
        return own(z, *args, **kwargs)

    vae.decode = decode_and_keep
    return seen


def as_shown(frames: Tensor, shape: torch.Size) -> Tensor:
    """Frames in [-1, 1] as pipelines return them."""
    shown = (frames.movedim(2, 1) / 2 + 0.5).clamp(0, 1)
    return shown if len(shape) == 5 else shown[:, 0]


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / (expected.max() - expected.min()))


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def wan() -> Any:
    return CASES["wan2.1"].pipeline()


@pytest.fixture
def flash(wan: Any, tmp_path: Path) -> Path:
    return flash_of(wan.vae, tmp_path)


def test_every_pipeline(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = case.pipeline()
    frames, latents = case.call(pipe), case.call(pipe, "latent")
    own = pipe.vae
    with flashvaed.accelerate(pipe, exact=True):
        assert pipe.vae is not own
        exact = difference(case.call(pipe), frames)
        assert torch.equal(case.call(pipe, "latent"), latents)  # the encoder is the pipeline's own
    assert exact <= BOUND
    assert pipe.vae is own and torch.equal(case.call(pipe), frames)

    place = flash_of(own, tmp_path)
    flashvaed.accelerate(pipe, place)
    seen = recorded(pipe.vae)
    found = case.call(pipe)
    clip = seen[0] if seen[0].ndim == 5 else seen[0].unsqueeze(2)  # those of images have no axis of time
    expected = decode(load_checkpoint(place, builtins={}).require_decoder(), clip)
    error = difference(found, as_shown(expected, found.shape))
    assert error <= FLASH_BOUND and difference(found, frames) > 0.05
    assert difference(torch.from_numpy(case.call(pipe, "np")).movedim(-1, -3), found) <= 1e-6
    with capsys.disabled():
        print(f"\n{type(pipe).__name__} {type(own).__name__}: exact {exact:.1e}, Flash {error:.1e} of the range")


def test_whole_pipeline_folders(wan: Any, flash: Path, tmp_path: Path) -> None:
    case = CASES["wan2.1"]
    with flashvaed.accelerate(wan, flash):
        frames = case.call(wan)
        wan.save_pretrained(tmp_path / "pipe")
    for given in ({}, {"vae": AutoencoderFlash.from_pretrained(tmp_path / "pipe" / "vae")}):
        found = diffusers.WanPipeline.from_pretrained(
            tmp_path / "pipe", tokenizer=None, trust_remote_code=True, **given
        )
        found.set_progress_bar_config(disable=True)
        assert isinstance(found.vae, AutoencoderFlash)
        assert not any(tensor.is_meta for tensor in found.vae.state_dict().values())
        assert difference(case.call(found.to("cpu")), frames) <= FLASH_BOUND
    remote = diffusers.AutoModel.from_pretrained(str(tmp_path / "pipe" / "vae"), trust_remote_code=True)
    pixels = torch.rand(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert torch.equal(remote.encode(pixels).latent_dist.mode(), wan.vae.encode(pixels).latent_dist.mode())
    again = load_checkpoint(tmp_path / "pipe" / "vae", builtins={})
    assert again.require_decoder().spec == load_checkpoint(flash, builtins={}).require_decoder().spec
    assert again.encoder is not None and again.latent_mean == load_checkpoint(flash, builtins={}).latent_mean


def test_what_pipelines_read_of_a_vae(wan: Any, flash: Path) -> None:
    own = wan.vae
    with flashvaed.accelerate(wan, flash):
        vae = wan.vae
        assert {key: vae.config[key] for key in own.config if not key.startswith("_")} == {
            key: value for key, value in own.config.items() if not key.startswith("_")
        }
        assert vae.temperal_downsample == own.temperal_downsample
        assert (vae.dtype, vae.device) == (torch.float32, torch.device("cpu"))
        latents = torch.randn(2, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
        frames = vae.decode(latents).sample
        assert torch.equal(frames, vae.decode(latents, return_dict=False)[0])
        vae.enable_tiling(tile_sample_min_height=16, tile_sample_min_width=16)
        vae.enable_slicing()
        assert difference(vae.decode(latents).sample, frames) <= FLASH_BOUND
        vae.disable_tiling()
        vae.disable_slicing()
        wan.to(torch.bfloat16)
        assert vae.dtype == torch.bfloat16 and vae.decode(latents.bfloat16()).sample.dtype == torch.bfloat16
        with pytest.raises(SpecError, match=r"takes latents \[B, 16, T, H, W\]"):
            vae.decode(latents[:, :3])
    assert own.dtype == torch.bfloat16  # the pipeline's own follows
    wan.to(torch.float32)


def test_offload_hooks_go_along(flash: Path) -> None:
    case = CASES["wan2.1"]
    pipe = case.pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    acceleration = flashvaed.accelerate(pipe, flash)
    hook = pipe.vae._hf_hook
    entered: list[int] = []
    own = hook.pre_forward
    hook.pre_forward = lambda module, *args, **kwargs: (entered.append(1), own(module, *args, **kwargs))[1]
    case.call(pipe)
    assert entered and not hasattr(acceleration.original, "_hf_hook")
    acceleration.undo()
    assert hasattr(pipe.vae, "_hf_hook")


def test_tiling_and_slicing_are_carried_over(flash: Path) -> None:
    pipe = SimpleNamespace(vae=CASES["wan2.1"].vae())
    pipe.vae.enable_tiling(tile_sample_min_height=64)
    pipe.vae.enable_slicing()
    flashvaed.accelerate(pipe, flash)
    assert pipe.vae.use_tiling and pipe.vae.use_slicing and pipe.vae._tile_pixels == 64


def test_accelerated_again_it_is_restored_first(wan: Any, flash: Path) -> None:
    own = wan.vae
    flashvaed.accelerate(wan, flash)
    second = flashvaed.accelerate(wan, exact=True)
    assert second.original is own
    second.undo()
    assert wan.vae is own


def test_mistakes(wan: Any, flash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = wan.vae
    for given in ((), (flash,)):
        with pytest.raises(FlashVaedError, match="either a decoder or exact=True"):
            flashvaed.accelerate(wan, *given, exact=bool(given))
    with pytest.raises(FlashVaedError, match="has no model as vae"):
        flashvaed.accelerate(SimpleNamespace(), exact=True)
    with pytest.raises(FlashVaedError, match=r"of the class Linear; this version reads .*AutoencoderKLLTX2Video"):
        flashvaed.accelerate(SimpleNamespace(vae=nn.Linear(1, 1)), exact=True)
    with pytest.raises(FlashVaedError, match=r"is a decoder of wan2\.1, and pipe.vae is of ltx-video-0\.9\.0"):
        flashvaed.accelerate(SimpleNamespace(vae=CASES["ltx-0.9.0"].vae()), flash)
    other = diffusers.AutoencoderKLWan(base_dim=4, latents_mean=[0.5] * 16)
    with pytest.raises(FlashVaedError, match=r"latents_mean of channel \d+ is .* and 0.5 in pipe.vae"):
        flashvaed.accelerate(SimpleNamespace(vae=other), flash)
    with pytest.raises(FlashVaedError, match="meta device"):
        flashvaed.accelerate(SimpleNamespace(vae=other.to("meta")), exact=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(FlashVaedError, match=r"pip install 'flashvaed\[diffusers\]'"):
        flashvaed.accelerate(wan, flash)
    assert wan.vae is own
