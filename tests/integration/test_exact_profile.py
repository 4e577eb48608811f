"""`convert-ops --profile exact`: the same frames from other operators, and every command takes the result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashvaed_cli.artifact.checkpoint import load_checkpoint
from flashvaed_cli.artifact.store import read_header
from flashvaed_cli.decoders.variants.exact import plain_spec
from tests.commands import CALIBRATION, JUDGING, invoke, read_report, succeed
from tests.toy import toy_latents, write_toy_clip, write_toy_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy VAE, a clip, and the exact decoder made of the VAE."""
    folder = tmp_path_factory.mktemp("exact")
    write_toy_vae(folder / "vae.safetensors")
    write_toy_clip(folder / "clip.mp4")
    succeed("convert-ops vae.safetensors --profile exact --output exact.safetensors", cwd=folder)
    return folder


def test_the_artifact_lists_every_layer_and_gives_the_same_frames(folder: Path) -> None:
    header = read_header(folder / "exact.safetensors")
    exact = load_checkpoint(str(folder / "exact.safetensors"), builtins={}).require_decoder()
    original = load_checkpoint(str(folder / "vae.safetensors"), builtins={}).require_decoder()
    operators = {address: layer.operator for address, layer in exact.spec.layers()}
    listed = header.measured["operators"]
    assert listed and listed == {
        address: operators[address] for address, layer in original.spec.layers() if operators[address] != layer.operator
    }
    assert plain_spec(exact.spec) == original.spec
    assert header.measured["max_difference_of_range"] < 1e-5
    latents = toy_latents(2, 4, 4).repeat(1, 4, 1, 1, 1)  # the toy file has 16 latent channels
    with torch.no_grad():
        torch.testing.assert_close(exact(latents), original(latents), rtol=0, atol=1e-4)


def test_eval_finds_no_difference(folder: Path) -> None:
    succeed(f"eval exact.safetensors --data clip.mp4 {JUDGING} --output report", cwd=folder)
    figures = {one["name"]: one for one in read_report(folder / "report")["decoders"]}
    assert figures["exact"]["to_original"]["psnr_db"] > 80.0


def test_pruning_and_export_work_on_plain_operators(folder: Path) -> None:
    succeed(f"prune exact.safetensors --ratio 0.5 --data clip.mp4 {CALIBRATION}", cwd=folder)
    pruned = load_checkpoint(str(folder / "pruned.safetensors"), builtins={}).require_decoder()
    assert plain_spec(pruned.spec) == pruned.spec
    succeed("export exact.safetensors --target safetensors --output out", cwd=folder)
    exported = load_checkpoint(str(folder / "out" / "exact.safetensors"), builtins={}).require_decoder()
    assert plain_spec(exported.spec) == exported.spec


def test_operators_beside_the_profile_are_a_mistake(folder: Path) -> None:
    result = invoke("convert-ops vae.safetensors --profile exact --operator up2=frame2d", cwd=folder)
    assert result.exit_code == 2
    assert "--profile is exact, which gives every layer its operator: leave --operator out" in result.stderr


def test_its_own_output_has_nothing_to_change(folder: Path) -> None:
    result = invoke(
        "convert-ops exact.safetensors --profile exact --data clip.mp4 --output again.safetensors", cwd=folder
    )
    assert result.exit_code == 2 and not (folder / "again.safetensors").exists()
    assert "every layer has its fastest exact operator; nothing to change" in result.stderr
    assert "--data: ignored by --profile exact" in result.stderr
