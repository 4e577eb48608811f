"""`distill --student` on a small VAE: the artifact, what reads it, what is refused; a training that is interrupted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashvaed_cli.artifact.checkpoint import load_checkpoint
from flashvaed_cli.artifact.store import content_sha256, read_header
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.decoders.spec.blocks import ConvBlockSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.light import LATENT_LIMIT, light_shape
from flashvaed_cli.families.wan21.spec import LATENT_MEAN, LATENT_STD
from tests.commands import CALIBRATION, JUDGING, TRAINING, invoke, read_report, succeed
from tests.light_toy import ALL_SHAPES
from tests.toy import write_toy_clip, write_toy_vae

NEW = f"distill vae.safetensors --data clip.mp4 {TRAINING}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE, a clip, and a student of each shape."""
    folder = tmp_path_factory.mktemp("light")
    write_toy_vae(folder / "vae.safetensors")
    write_toy_clip(folder / "clip.mp4")
    for shape in ALL_SHAPES:
        succeed(f"{NEW} --student {shape} --student-width 8 --num-steps 3 -o {shape}.safetensors", cwd=folder)
    return folder


def spec_of(path: Path) -> DecoderSpec:
    spec = read_header(path).decoder
    assert spec is not None
    return spec


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_the_artifact_names_the_original_that_taught_it(folder: Path, shape: str) -> None:
    header = read_header(folder / f"{shape}.safetensors")
    assert header.kind == "decoder" and header.family == "wan2.1" and header.kept_channels == {}
    assert header.original is not None and header.original.sha256 == content_sha256(folder / "vae.safetensors")
    assert header.latent_mean == LATENT_MEAN and light_shape(spec_of(folder / f"{shape}.safetensors")) == shape
    student = header.measured["student"]
    assert (student["shape"], student["width"]) == (shape, 8)
    assert student["start"]["missed_after"] < student["start"]["missed_before"]
    assert [phase["phase"] for phase in header.measured["phases"]] == [3]


def test_latents_are_normalized_with_the_originals_statistics(folder: Path) -> None:
    entry = spec_of(folder / "tae.safetensors").stage("conv_in").blocks[0]
    assert isinstance(entry, ConvBlockSpec) and entry.entry is not None
    assert (entry.entry.mean, entry.entry.std, entry.entry.limit) == (LATENT_MEAN, LATENT_STD, LATENT_LIMIT)


def test_training_comes_nearer_to_the_original(tmp_path: Path, folder: Path) -> None:
    for name in ("vae.safetensors", "clip.mp4"):
        (tmp_path / name).symlink_to(folder / name)
    figures = succeed(
        f"{NEW} --student tae --student-width 8 --num-steps 40 --learning-rate 3e-3 --student-start random",
        cwd=tmp_path,
    )
    same = figures["same_clips"]
    assert same["psnr_db_after"] > same["psnr_db_before"] + 2
    assert "without the loss terms" not in figures["stderr"]  # features, which the shapes do not share, are no gap
    assert figures["student"]["start"] == "random"


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_eval_info_and_decode_take_it(folder: Path, shape: str) -> None:
    succeed(f"eval {shape}.safetensors --data clip.mp4 {JUDGING} -o report-{shape}", cwd=folder)
    judged = {one["name"]: one for one in read_report(folder / f"report-{shape}")["decoders"]}
    assert judged[shape]["shape"] == shape and "shape" not in judged["original"]
    assert judged[shape]["gflops_per_frame"] > 0 and judged[shape]["to_original"]["psnr_db"] > 5
    (facts,) = succeed(f"info {shape}.safetensors", cwd=folder)["files"]
    assert facts["decoder"]["shape"] == shape and facts["decoder"]["is_causal"] and facts["decoder"]["gflop"] > 0
    torch.save(torch.randn(1, 16, 2, 4, 4), folder / "latents.pt")
    succeed(f"decode latents.pt -d {shape}.safetensors -o {shape}.npy", cwd=folder)
    assert np.load(folder / f"{shape}.npy").shape == (3, 5, 32, 32)


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_exported_weights_give_its_frames(folder: Path, shape: str) -> None:
    succeed(f"export {shape}.safetensors -t safetensors -t diffusers -t comfyui -o export-{shape}", cwd=folder)
    latents = torch.randn(1, 16, 2, 4, 4)
    expected = decode(load_checkpoint(folder / f"{shape}.safetensors", builtins={}).require_decoder(), latents)
    for exported in (f"{shape}.safetensors", "diffusers", f"comfyui/{shape}/{shape}.safetensors"):
        again = load_checkpoint(folder / f"export-{shape}" / exported, builtins={}).require_decoder()
        assert torch.equal(decode(again, latents), expected)


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_it_is_pruned_and_trained_on(folder: Path, shape: str) -> None:
    figures = succeed(
        f"prune {shape}.safetensors --ratio 0.5 --data clip.mp4 {CALIBRATION} -o {shape}-half.safetensors", cwd=folder
    )
    assert figures["parameters_after"] < figures["parameters_before"]
    assert read_header(folder / f"{shape}-half.safetensors").kept_channels == {}
    (facts,) = succeed(f"info {shape}-half.safetensors", cwd=folder)["files"]
    assert facts["next"][0].startswith(f"flashvaed distill {shape}-half.safetensors")
    again = succeed(
        f"distill {shape}-half.safetensors --data clip.mp4 {TRAINING} --num-steps 2 -o {shape}-again.safetensors",
        cwd=folder,
    )
    assert [phase["phase"] for phase in again["phases"]] == [3]
    assert "student" not in again


def test_a_derived_input_stands_for_its_original(folder: Path) -> None:
    words = f"distill tae.safetensors --data clip.mp4 {TRAINING} --student tae --student-width 8 --num-steps 1"
    succeed(f"{words} --loss-weight feature=0 -o second.safetensors", cwd=folder)
    first, second = (read_header(folder / name) for name in ("tae.safetensors", "second.safetensors"))
    assert first.original is not None and second.original == first.original
    done = succeed(f"{words} --loss-weight feature=0 -o second.safetensors", cwd=folder)
    assert any("up to date" in note for note in done["notes"])


def test_an_interrupted_training_ends_with_the_same_weights(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashvaed_cli.distill import loop

    for name in ("vae.safetensors", "clip.mp4"):
        (tmp_path / name).symlink_to(folder / name)
    words = f"{NEW} --student tae --student-width 8 --num-steps 4 --checkpoint-every-steps 2 -o out.safetensors"
    saved = loop._save

    def die(*arguments: Any) -> None:
        saved(*arguments)
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_save", die)
        with pytest.raises(RuntimeError, match="killed"):
            succeed(words, cwd=tmp_path)
    assert not (tmp_path / "out.safetensors").exists()
    figures = succeed(words, cwd=tmp_path)
    assert figures["phases"][0]["resumed_from"] == 2
    whole = succeed(words.replace("out.safetensors", "whole.safetensors"), cwd=tmp_path)
    assert whole["phases"][0]["resumed_from"] is None
    killed, unbroken = (
        load_checkpoint(tmp_path / f"{name}.safetensors", builtins={}).require_decoder().state_dict()
        for name in ("out", "whole")
    )
    assert all(torch.equal(killed[name], unbroken[name]) for name in unbroken)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{NEW} --student tae --phase 1", "phase 1 does not fit a new tae: its blocks are not the original's"),
        (f"{NEW} --student tae --phase 2", "phase 2 does not fit a new tae: .*phase 3 alone fits"),
        (f"{NEW} --student efficientvit --student-width 9", "multiple of 8, not 9"),
        (f"{NEW} --student tae --student-width 99999", "tae of 99999 channels: at most 8192"),
        (f"{NEW} --student-width 9", "--student-width: only for a new decoder"),
        (f"convert-ops tae.safetensors --data clip.mp4 {CALIBRATION}", "light already.*--profile exact"),
        (f"prune tae.safetensors --layout native --data clip.mp4 {CALIBRATION}", "not its original at another base"),
    ],
)
def test_what_makes_no_sense_says_why(folder: Path, words: str, message: str) -> None:
    result = invoke(f"{words} -o refused.safetensors", cwd=folder)
    assert result.exit_code == 2
    assert re.search(message, " ".join(result.stderr.split()))


def test_an_adversary_that_never_begins_is_told(folder: Path) -> None:
    words = f"{NEW} --student tae --student-width 8 --num-steps 2 --loss-weight adversarial=0.1 --dry-run"
    never = succeed(f"{words} --adversarial-start 2", cwd=folder)
    assert "--adversarial-start 2: no phase has more than 2 steps" in never["stderr"]
    assert "adversarial-start" not in succeed(f"{words} --adversarial-start 1", cwd=folder)["stderr"]


def test_a_ratio_is_said_to_be_ignored(folder: Path) -> None:
    done = succeed(f"{NEW} --student tae --student-width 8 --ratio 0.5 --dry-run -o dry.safetensors", cwd=folder)
    assert "--ratio: ignored with --student" in done["stderr"]


def test_a_dry_run_says_what_would_be_trained(folder: Path) -> None:
    figures = succeed(f"{NEW} --student tae --student-width 8 --num-steps 3 --dry-run -o dry.safetensors", cwd=folder)
    assert figures["phases"] == "3 (3 steps)"
    assert not (folder / "dry.safetensors").exists()
