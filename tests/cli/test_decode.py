"""`flashvaed decode`: every kind of latents to every kind of output, whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from flashvaed_cli.artifact.checkpoint import load_checkpoint, save_checkpoint
from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.decoders.run import runtime
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.media.pixels import to_pixels
from tests.commands import invoke, succeed
from tests.hunyuan15_toy import hunyuan15_spec
from tests.ltx_toy import ltx_decoder, ltx_spec
from tests.toy import toy_decoder, write_toy_vae

NUM_FRAMES = 17  # of five latents


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_vae(tmp_path_factory.mktemp("vae") / "vae.safetensors")


@pytest.fixture
def latents(tmp_path: Path) -> Tensor:
    """Normalized, and as files of several kinds in `in/`."""
    tensor = torch.randn(1, 16, 5, 3, 4)
    (tmp_path / "in").mkdir()
    save_file({"latents": tensor}, tmp_path / "in" / "a.safetensors")
    torch.save(tensor[0], tmp_path / "in" / "b.pt")
    np.save(tmp_path / "in" / "c.npy", tensor.numpy())
    return tensor


def frames_of(vae: Path, latents: Tensor) -> Tensor:
    """[3, F, H, W]: all at once, with the plain operators of the artifact."""
    checkpoint = load_checkpoint(vae, builtins={})
    mean, std = (torch.tensor(row).view(1, -1, 1, 1, 1) for row in checkpoint.require_statistics())
    with torch.no_grad():
        return decode(checkpoint.require_decoder(), latents * std + mean)[0].clamp(-1, 1)


@pytest.mark.parametrize("name", ["a.safetensors", "b.pt", "c.npy"])
def test_frames_are_those_of_the_decoder(tmp_path: Path, vae: Path, latents: Tensor, name: str) -> None:
    told = succeed(f"decode in/{name} -d {vae} -o out.npy", cwd=tmp_path)
    assert told["paths"] == ["out.npy"]
    (video,) = told["videos"]
    assert (video["num_frames"], video["height"], video["width"]) == (NUM_FRAMES, 24, 32)
    assert torch.allclose(torch.from_numpy(np.load(tmp_path / "out.npy")), frames_of(vae, latents), atol=1e-5)
    assert "taken as normalized" in told["notes"][0]


def test_raw_latents_are_taken_as_they_are(tmp_path: Path, vae: Path, latents: Tensor) -> None:
    mean, std = (
        torch.tensor(row).view(1, -1, 1, 1, 1) for row in load_checkpoint(vae, builtins={}).require_statistics()
    )
    torch.save(latents * std + mean, tmp_path / "raw.pt")
    told = succeed(f"decode raw.pt --latent-scale raw -d {vae} -o out.pt --chunk 2", cwd=tmp_path)
    read = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.allclose(read, frames_of(vae, latents), atol=1e-5)
    assert told["videos"][0]["latent_scale"] == "raw" and "taken as raw" in told["notes"][0]


def test_a_latent_of_comfyui_is_raw_whatever_is_asked(tmp_path: Path, vae: Path, latents: Tensor) -> None:
    mean, std = (
        torch.tensor(row).view(1, -1, 1, 1, 1) for row in load_checkpoint(vae, builtins={}).require_statistics()
    )
    raw = (latents * std + mean).contiguous()
    save_file({"latent_tensor": raw, "latent_format_version_0": torch.tensor([])}, tmp_path / "comfy.latent")
    told = succeed(f"decode comfy.latent -d {vae} -o out.pt", cwd=tmp_path)
    assert torch.allclose(torch.load(tmp_path / "out.pt", weights_only=True), frames_of(vae, latents), atol=1e-5)
    assert told["videos"][0]["latent_scale"] == "raw"


def test_an_mp4_plays_with_its_colours_named(tmp_path: Path, vae: Path, latents: Tensor) -> None:
    succeed(f"decode in/a.safetensors -d {vae} -o out.mp4 --fps 30000/1001 --crf 1", cwd=tmp_path)
    with av.open(tmp_path / "out.mp4") as container:
        stream = container.streams.video[0]
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        context = stream.codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        assert stream.average_rate is not None and float(stream.average_rate) == pytest.approx(29.97, abs=0.01)
    expected = to_pixels(frames_of(vae, latents)).astype(float)
    assert read.shape == expected.shape
    assert abs(read.mean() - expected.mean()) < 2  # 4:2:0 halves the colours of noise, and keeps their mean


def test_a_folder_of_latents_gives_a_video_each(tmp_path: Path, vae: Path, latents: Tensor) -> None:
    torch.save(torch.cat([latents, -latents]), tmp_path / "in" / "pair.pt")
    told = succeed(f"decode in -d {vae} -o out --dtype bfloat16", cwd=tmp_path)
    names = ["a.mp4", "b.mp4", "c.mp4", "pair-1.mp4", "pair-2.mp4"]
    assert told["paths"] == [f"out/{name}" for name in names]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert [video["clip"] for video in told["videos"]] == [0, 0, 0, 0, 1]


def test_pictures_of_a_shorter_clip_replace_all_of_a_longer_one(tmp_path: Path, vae: Path, latents: Tensor) -> None:
    succeed(f"decode in/b.pt -d {vae} -o frames --format png", cwd=tmp_path)
    assert len(list((tmp_path / "frames").iterdir())) == NUM_FRAMES
    torch.save(latents[:, :, :2], tmp_path / "short.pt")
    succeed(f"decode short.pt -d {vae} -o frames --format png", cwd=tmp_path)
    files = sorted((tmp_path / "frames").iterdir())
    assert len(files) == 5
    read = np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)
    assert abs(read - to_pixels(frames_of(vae, latents[:, :, :2]))).max() <= 1


def test_raw_frames_on_stdout_and_nothing_else(tmp_path: Path, vae: Path, latents: Tensor) -> None:
    result = invoke(f"decode in/a.safetensors -d {vae} -o -", cwd=tmp_path)
    assert result.exit_code == 0
    read = np.frombuffer(result.stdout_bytes, np.uint8).reshape(NUM_FRAMES, 24, 32, 3).astype(int)
    assert abs(read - to_pixels(frames_of(vae, latents))).max() <= 1
    assert "Decoded with" in result.stderr


def test_a_reader_that_leaves_is_a_clean_end(tmp_path: Path, vae: Path) -> None:
    torch.save(torch.randn(16, 9, 16, 16), tmp_path / "long.pt")  # more than a pipe holds
    command = [sys.executable, "-m", "flashvaed_cli", "decode", "long.pt", "-d", str(vae), "-o", "-", "--chunk", "1"]
    program = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert program.stdout is not None and program.stderr is not None
    assert len(program.stdout.read(128 * 128 * 3)) == 128 * 128 * 3
    program.stdout.close()
    told = program.stderr.read().decode()
    program.stderr.close()
    assert program.wait() == 0, told
    assert "the reader of standard output left after" in " ".join(told.split()) and "Traceback" not in told


def test_one_bad_file_does_not_take_the_others_with_it(tmp_path: Path, vae: Path, latents: Tensor) -> None:
    (tmp_path / "in" / "b.pt").write_bytes(b"no tensor")
    torch.save(torch.full((16, 2, 3, 4), torch.nan), tmp_path / "in" / "d.pt")
    result = invoke(f"decode in -d {vae} -o out --format npy --json", cwd=tmp_path)
    assert result.exit_code == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.npy", "c.npy"]
    assert "b.pt" in result.stderr and "d.pt" in result.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("in -o out.mp4", "hold 3 clips: give a folder"),
        ("in -o -", "standard output is one stream"),
        ("in/a.safetensors -o out.mov", ".mov is not written"),
        ("in/a.safetensors -o out.png", "17 frames: give a folder"),
        ("in/a.safetensors -o out.mp4 --format npy", "out.mp4 is .mp4"),
        ("in/a.safetensors -o in/a.safetensors --force", "is not written"),
        ("in/c.npy -o in/c.npy --force", "is read, and would be replaced"),
        ("in/c.npy -o other.npy", "was not written by flashvaed"),
        ("vae.mp4", "does not exist"),
        ("in/a.safetensors --fps 0", "must be a rate above 0"),
        ("in/a.safetensors --max-memory 1KB", "1 byte|memory|GB|KB"),
    ],
)
def test_mistakes_are_told_before_the_work(tmp_path: Path, vae: Path, latents: Tensor, words: str, told: str) -> None:
    (tmp_path / "other.npy").write_bytes(b"mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = invoke(f"decode {words} -d {vae}", cwd=tmp_path)
    assert result.exit_code == 2
    assert any(part in " ".join(result.stderr.split()) for part in told.split("|")), result.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("causal", [False, True])
def test_a_decoder_that_sees_ahead_gives_the_frames_of_the_whole_clip(tmp_path: Path, causal: bool) -> None:
    decoder = ltx_decoder(ltx_spec(causal=causal))
    header = ArtifactHeader(kind="decoder", family=decoder.spec.family, latent_mean=(0.5,) * 4, latent_std=(2.0,) * 4)
    save_checkpoint(tmp_path / "ltx.safetensors", header, decoder=decoder)
    latents = torch.randn(1, 4, 7, 2, 3)
    torch.save(latents, tmp_path / "latents.pt")
    (video,) = succeed("decode latents.pt -d ltx.safetensors -o out.npy --chunk 2", cwd=tmp_path)["videos"]
    assert (video["num_frames"], video["fps"], video["chunk"]) == (49, 24.0, 2)
    with torch.no_grad():
        expected = decode(decoder, latents * 2.0 + 0.5)[0].clamp(-1, 1)
    assert torch.allclose(torch.from_numpy(np.load(tmp_path / "out.npy")), expected, atol=1e-5)


@pytest.fixture
def growing(tmp_path: Path) -> Path:
    """HunyuanVideo 1.5: the state of its attention grows with the clip."""
    spec = hunyuan15_spec()
    header = ArtifactHeader(kind="decoder", family=spec.family, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4)
    save_checkpoint(tmp_path / "growing.safetensors", header, decoder=toy_decoder(spec))
    return tmp_path / "growing.safetensors"


def test_a_limit_of_memory_is_for_the_clip_not_for_a_longer_one(tmp_path: Path, growing: Path) -> None:
    torch.save(torch.randn(1, 4, 2, 40, 40), tmp_path / "latents.pt")
    told = succeed(f"decode latents.pt -d {growing} --latent-scale raw --max-memory 270MB -o out.npy", cwd=tmp_path)
    assert (told["videos"][0]["chunk"], told["videos"][0]["tile"]) == (2, None)


def test_a_clip_whose_state_grows_is_compiled_in_one_step(
    tmp_path: Path, growing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chunk is the whole clip; compiling itself is left out here."""
    monkeypatch.setattr(runtime, "require_compiler", lambda _device: None)
    monkeypatch.setattr(runtime, "_compile_step", uncompiled)
    latents = torch.randn(1, 4, 6, 2, 3)
    torch.save(latents, tmp_path / "latents.pt")
    words = f"decode latents.pt -d {growing} --latent-scale raw --compile -o out.npy"
    assert succeed(words, cwd=tmp_path)["videos"][0]["chunk"] == 6
    with torch.no_grad():
        expected = decode(load_checkpoint(growing, builtins={}).require_decoder(), latents)[0]
    assert torch.allclose(torch.from_numpy(np.load(tmp_path / "out.npy")), expected, atol=1e-5)
    refused = invoke(f"{words} --chunk 2 --force", cwd=tmp_path)
    assert refused.exit_code == 2 and "in one step (without a chunk)" in " ".join(refused.stderr.split())


def uncompiled(run: runtime.BlockRun, _backend: str, *, keep: bool) -> Callable[..., tuple[Tensor, dict | None]]:
    """The step that would be compiled."""

    def step(x: Tensor, past: dict | None) -> tuple[Tensor, dict | None]:
        future: dict | None = {} if keep else None
        return run(x, past, future), future

    return step


def test_one_latent_is_one_picture(tmp_path: Path, vae: Path, latents: Tensor) -> None:
    torch.save(latents[:, :, :1], tmp_path / "image.pt")
    succeed(f"decode image.pt -d {vae} -o image.png", cwd=tmp_path)
    read = np.asarray(Image.open(tmp_path / "image.png")).astype(int)
    assert abs(read - to_pixels(frames_of(vae, latents[:, :, :1]))[0]).max() <= 1


def test_pictures_of_others_are_left_alone(tmp_path: Path, vae: Path, latents: Tensor) -> None:
    """Also in a folder that holds frames of ours."""
    succeed(f"decode in/a.safetensors -d {vae} --format png -o frames", cwd=tmp_path)
    (tmp_path / "frames" / "000003.png").write_bytes(b"a photo")
    result = invoke(f"decode in/a.safetensors -d {vae} --format png -o frames -q", cwd=tmp_path)
    assert result.exit_code == 2 and "000003.png was not written by flashvaed" in result.stderr
    assert (tmp_path / "frames" / "000003.png").read_bytes() == b"a photo"
    succeed(f"decode in/a.safetensors -d {vae} --format png -o frames --force", cwd=tmp_path)
    assert (tmp_path / "frames" / "000003.png").read_bytes() != b"a photo"
