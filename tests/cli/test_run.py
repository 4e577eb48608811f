"""`run` and `recipes`: whole recipes, passed over where nothing has changed, ended by the first failure."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flashvaed_cli import __version__
from flashvaed_cli.artifact.checkpoint import load_checkpoint, save_checkpoint
from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.artifact.store import sha256_of
from flashvaed_cli.cli.app import app
from flashvaed_cli.cli.commands.run import plan_steps
from flashvaed_cli.recipe import find_recipe, load_recipe
from tests.commands import JUDGING, invoke, read_report
from tests.toy import write_toy_clip, write_toy_vae

RECIPE = """
description: small
steps:
  - prune: {keep_ratio: 0.5, num_calibration_clips: 2, num_frames: 5, crop_size: 32, device: cpu}
  - eval: {num_speed_rounds: 1, lpips: "off", vmaf: "off", video: false, device: cpu, require: "psnr_db>=1"}
"""


def words_of(name: str, original: str | None = None) -> list[str]:
    return [step.shown for step in plan_steps(load_recipe(find_recipe(name)), name, original, ("c/",), ("j/",), ())]


def test_steps_are_what_a_user_would_type() -> None:
    assert words_of("demo", "vae.pth") == [
        "flashvaed analyze vae.pth --recipe demo --data c/",
        "flashvaed prune vae.pth --recipe demo --data c/",
        "flashvaed convert-ops pruned.safetensors --recipe demo --data c/",
        "flashvaed distill converted.safetensors --recipe demo --data c/",
        "flashvaed eval flash.safetensors --recipe demo --data j/",
        "flashvaed export flash.safetensors --recipe demo",
    ]
    assert words_of("mild")[0] == "flashvaed prune builtin:tiny-wan --recipe mild --data c/"
    paper = words_of("paper", "wan.pth")
    assert "wan.pth" in paper[0] and all("wan.pth" not in words for words in paper[1:])
    assert "--step phase1" in paper[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_toy_vae(tmp_path / "vae.safetensors")
    write_toy_clip(tmp_path / "clip.mp4")
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path


def run(folder: Path, words: str) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(app, words.split())
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


RUN = "run small.yaml vae.safetensors --data clip.mp4 --judge clip.mp4 -q"


def test_what_is_up_to_date_is_passed_over_and_what_has_changed_made_again(folder: Path) -> None:
    first = run(folder, RUN)
    assert first.exit_code == 0, first.output
    assert "[1/2] flashvaed prune vae.safetensors --recipe small.yaml" in first.stderr
    assert "pruned.safetensors has seen clip.mp4 (prune)" in first.stderr
    made = {path: path.stat().st_mtime_ns for path in (folder / "pruned.safetensors", folder / "report/report.json")}
    again = run(folder, RUN)
    assert again.exit_code == 0 and again.stdout.count("is up to date") == 2
    assert {path: path.stat().st_mtime_ns for path in made} == made
    write_toy_vae(folder / "vae.safetensors", seed=5)
    changed = run(folder, RUN)
    assert changed.exit_code == 0 and "is up to date" not in changed.stdout
    assert all(path.stat().st_mtime_ns > made[path] for path in made)


def test_other_settings_ask_for_another_place(folder: Path) -> None:
    assert run(folder, RUN).exit_code == 0
    before = sha256_of(folder / "pruned.safetensors")
    words = "prune vae.safetensors --recipe small.yaml --data clip.mp4 -q --device cpu"
    refused = invoke(f"{words} --ratio 0.75", cwd=folder)
    assert refused.exit_code == 2 and sha256_of(folder / "pruned.safetensors") == before
    assert "is the finished result of `flashvaed prune vae.safetensors" in refused.stderr
    assert "(keep_ratio differs)" in refused.stderr.replace("\n", " ") and "--force" in refused.stderr
    assert invoke(f"{words} --ratio 0.75 -o other.safetensors", cwd=folder).exit_code == 0
    assert invoke(f"{words} --ratio 0.75 --force", cwd=folder).exit_code == 0
    assert sha256_of(folder / "pruned.safetensors") != before
    other = invoke("convert-ops vae.safetensors -o pruned.safetensors --data clip.mp4", cwd=folder)
    assert other.exit_code == 2 and "is the finished result of `flashvaed prune" in other.stderr.replace("\n", " ")


def test_data_that_changed_are_noticed(folder: Path) -> None:
    words = "prune vae.safetensors --recipe small.yaml --data clip.mp4 -q --device cpu"
    invoke(words, cwd=folder)
    write_toy_clip(folder / "clip.mp4", 9)
    os.utime(folder / "clip.mp4", (0, 0))  # older than the run, but not what it read
    again = invoke(words, cwd=folder)
    assert again.exit_code == 0 and "is up to date" not in again.stdout


def test_a_condition_that_fails_ends_the_run_with_1_and_again_when_up_to_date(folder: Path) -> None:
    (folder / "small.yaml").write_text(RECIPE.replace("psnr_db>=1", "psnr_db>=99") + "  - export: {}\n")
    for _ in range(2):
        result = run(folder, RUN)
        assert result.exit_code == 1
        assert "psnr_db>=99: for pruned it is" in result.stderr and "step 2 of 3 failed" in result.stderr
        assert not (folder / "export").exists()
    assert read_report(folder / "report")["gates"][0]["passed"] is False


def test_recipes_are_listed_and_printed(tmp_path: Path) -> None:
    listed = run(tmp_path, "recipes")
    assert listed.exit_code == 0 and "mild" in listed.stdout and "prune, eval, export" in listed.stdout
    printed = run(tmp_path, "recipes mild")
    assert printed.stdout == find_recipe("mild").read_text()
    unknown = run(tmp_path, "recipes wild")
    assert unknown.exit_code == 2 and "choose from demo, fast" in unknown.stderr


def test_a_decoder_of_single_images_is_up_to_date_like_any_other(folder: Path) -> None:
    """Its frames are cut to one whatever is asked; what was asked is what is compared."""
    assert invoke("convert-ops vae.safetensors --profile image -o still.safetensors", cwd=folder).exit_code == 0
    words = f"eval still.safetensors --data clip.mp4 {JUDGING} --junit eval.xml"
    assert invoke(words, cwd=folder).exit_code == 0
    assert "is up to date" in invoke(words, cwd=folder).stdout
    (folder / "eval.xml").unlink()
    assert invoke(words, cwd=folder).exit_code == 0 and (folder / "eval.xml").is_file()


@pytest.mark.parametrize(
    "made_with",
    [
        {"recipe": {}, "inputs": ["a"], "data": [], "tool": __version__, "started": "x", "command": "export"},
        {"recipe": {}, "inputs": {"a": 1}, "data": [], "tool": __version__, "started": "x", "command": "export"},
        {"recipe": {}, "inputs": {}, "data": [], "tool": __version__, "started": "x"},
    ],
)
def test_manifests_of_strangers_are_no_traceback(folder: Path, made_with: object) -> None:
    (folder / "export").mkdir()
    document = {"kind": "flashvaed-export", "command": "flashvaed export", "made_with": made_with}
    (folder / "export" / "export.json").write_text(json.dumps(document))
    result = invoke("export vae.safetensors -t safetensors", cwd=folder)  # anything but SystemExit is raised
    assert result.exit_code in (0, 2)


def test_a_decoder_without_clips_is_converted_and_not_judged(folder: Path) -> None:
    """Bare weights without an encoder: cut weights need no data, so none may be asked for."""
    checkpoint = load_checkpoint(folder / "vae.safetensors", builtins={})
    mean, std = checkpoint.latent_mean, checkpoint.latent_std
    header = ArtifactHeader(kind="decoder", family=checkpoint.family, latent_mean=mean, latent_std=std)
    save_checkpoint(folder / "bare.safetensors", header, decoder=checkpoint.require_decoder())
    words = "convert-ops bare.safetensors --reconstruct none --data clip.mp4"
    result = invoke(words, cwd=folder)
    assert result.exit_code == 0, result.stderr
    assert "the result is not judged" in result.stderr and (folder / "converted.safetensors").is_file()
