"""`flashvaed.load`, and what the decoder does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashvaed_cli as flashvaed
from flashvaed_cli.artifact.checkpoint import load_checkpoint, save_checkpoint
from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.decoders.run.streaming import decode, encode
from flashvaed_cli.errors import ArtifactError, FlashVaedError, SpecError
from flashvaed_cli.families.wan21.spec import LATENT_MEAN, LATENT_STD
from tests.ltx_toy import ltx_decoder, ltx_spec
from tests.toy import write_toy_vae

EXACT = 1e-5  # exact operators sum in another order


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_vae(tmp_path_factory.mktemp("vae") / "vae.safetensors")


@pytest.fixture(scope="module")
def vae(place: Path) -> flashvaed.Vae:
    return flashvaed.load(place, device="cpu", chunk=2)


def latents(num_latents: int = 5) -> torch.Tensor:
    return torch.randn(2, 16, num_latents, 2, 3, generator=torch.Generator().manual_seed(0))


def raw(normalized: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(row).view(-1, 1, 1, 1) for row in (LATENT_MEAN, LATENT_STD))
    return normalized * std + mean


def test_frames_are_those_of_the_decoder(vae: flashvaed.Vae, place: Path) -> None:
    expected = decode(load_checkpoint(place, builtins={}).require_decoder(), raw(latents()))
    assert torch.allclose(vae.decode(latents()), expected, atol=EXACT)
    assert torch.allclose(vae.decode(raw(latents()), scale="raw"), expected, atol=EXACT)
    assert not torch.allclose(vae.decode(latents(), scale="raw"), expected, atol=0.01)
    assert expected.shape == (2, 3, 1 + vae.temporal_factor * 4, 2 * vae.spatial_factor, 3 * vae.spatial_factor)


def test_step_by_step_and_streamed(vae: flashvaed.Vae) -> None:
    expected = vae.decode(latents())
    parts = list(vae.iter_decode(latents()))
    assert len(parts) == 3 and torch.allclose(torch.cat(parts, dim=2), expected, atol=EXACT)
    stream = vae.stream(2, 3, batch=2)
    steps = [stream.step(part) for part in latents().split([1, 3, 1], dim=2)]
    assert [step.shape[2] for step in steps] == [1, 12, 4]
    assert torch.allclose(torch.cat([*steps, stream.flush()], dim=2), expected, atol=EXACT)


def test_a_decoder_that_sees_ahead_is_streamed_with_what_flush_gives(tmp_path: Path) -> None:
    decoder = ltx_decoder(ltx_spec())
    header = ArtifactHeader(kind="decoder", family=decoder.spec.family, latent_mean=(0.5,) * 4, latent_std=(2.0,) * 4)
    save_checkpoint(tmp_path / "ltx.safetensors", header, decoder=decoder)
    vae = flashvaed.load(tmp_path / "ltx.safetensors", device="cpu")
    given = torch.randn(1, 4, 12, 2, 2, generator=torch.Generator().manual_seed(0))
    stream = vae.stream(2, 2)
    steps = [stream.step(part) for part in given.split(3, dim=2)]
    rest = stream.flush()
    assert rest.shape[2] > 0
    assert torch.allclose(torch.cat([*steps, rest], dim=2), vae.decode(given), atol=EXACT)
    assert torch.allclose(vae.decode(given), decode(decoder, given * 2.0 + 0.5), atol=EXACT)


def test_encode(vae: flashvaed.Vae, place: Path) -> None:
    frames = torch.rand(1, 3, 5, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = encode(load_checkpoint(place, builtins={}).require_encoder(), frames)
    assert torch.allclose(vae.encode(frames, scale="raw"), expected, atol=EXACT)
    assert torch.allclose(raw(vae.encode(frames)), expected, atol=EXACT)
    half = flashvaed.load(place, device="cpu", dtype="bfloat16")
    assert half.encode(frames).dtype == half.encode(frames, scale="raw").dtype == half.dtype == torch.bfloat16
    assert all(
        parameter.dtype == half.dtype for parameter in half._checkpoint.require_decoder().parameters()
    )  # one set


def test_without_an_encoder(tmp_path: Path, place: Path) -> None:
    alone = load_checkpoint(place, builtins={})
    header = ArtifactHeader(kind="decoder", family=alone.family, latent_mean=LATENT_MEAN, latent_std=LATENT_STD)
    save_checkpoint(tmp_path / "alone.safetensors", header, decoder=alone.require_decoder())
    frames = torch.zeros(1, 3, 1, 16, 16)
    with pytest.raises(ArtifactError, match="no encoder"):
        flashvaed.load(tmp_path / "alone.safetensors", device="cpu").encode(frames)
    given = flashvaed.load(tmp_path / "alone.safetensors", device="cpu", original=place)
    whole = flashvaed.load(place, device="cpu")
    assert torch.allclose(given.encode(frames), whole.encode(frames), atol=EXACT)


def test_dtype(place: Path) -> None:
    for dtype in ("bfloat16", torch.bfloat16):
        frames = flashvaed.load(place, device="cpu", dtype=dtype).decode(latents(2))
        assert frames.dtype == torch.bfloat16


def test_mistakes(vae: flashvaed.Vae, place: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="scale is 'latent'"):
        vae.decode(latents(), scale="latent")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"takes latents \[B, 16, T, H, W\], got \[1, 4, 1, 2, 2\]"):
        vae.decode(torch.zeros(1, 4, 1, 2, 2))
    with pytest.raises(FlashVaedError, match="dtype is int8"):
        flashvaed.load(place, dtype="int8")
    with pytest.raises(FlashVaedError, match="device is 'gpu'"):
        flashvaed.load(place, device="gpu")
    with pytest.raises(FlashVaedError, match="max_memory is 'much'"):
        flashvaed.load(place, device="cpu", max_memory="much")
    with pytest.raises(ArtifactError, match="no such file"):
        flashvaed.load(tmp_path / "absent.safetensors")


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, flashvaed_cli as f; assert 'torch' not in sys.modules and 'pydantic' not in sys.modules; "
        "assert set(f.__all__) <= set(dir(f)); f.load; assert 'torch' in sys.modules; "
        "assert 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    for name in flashvaed.__all__:
        assert getattr(flashvaed, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        flashvaed.nothing  # type: ignore[attr-defined]  # noqa: B018
