"""`distill` on data as people have it: odd and broken videos, lists, buckets, a cache, worker processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.recipe.distill import DistillRecipe
from flashvaed_cli.stages.common.loading import load_inputs
from flashvaed_cli.stages.distill.data import training_data
from tests.commands import invoke, succeed
from tests.integration.test_odd_videos import ODD_CLIPS
from tests.toy import write_toy_clip, write_toy_vae

STEPS = "--phase 3 --num-steps 2 --batch-size 1 --num-workers 0 --loss-weight lpips=0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE, a narrow decoder of it, and a folder of odd clips, two of them broken."""
    folder = tmp_path_factory.mktemp("training")
    write_toy_vae(folder / "vae.safetensors")
    write_toy_clip(folder / "good.mp4")
    succeed(
        "prune vae.safetensors --ratio 0.5 --reconstruct none -o cut.safetensors --data good.mp4 "
        "--num-calibration-clips 1 --num-frames 5 --crop-size 32",
        cwd=folder,
    )
    (folder / "odd").mkdir()
    for clip in ODD_CLIPS:
        clip.make(folder / "odd" / clip.name)
    (folder / "odd/noise.mp4").write_bytes(bytes(range(256)) * 20)
    (folder / "odd/empty.mp4").write_bytes(b"")
    return folder


def distill(words: str, folder: Path, output: Path) -> dict[str, Any]:
    """The record of the data, after checking that the artifact has it too."""
    data = succeed(f"distill cut.safetensors {STEPS} -o '{output}' {words}", cwd=folder)["data"]
    with safe_open(output, framework="pt") as file:
        header = json.loads(file.metadata()["flashvaed"])
    assert header["measured"]["data"] == data
    return data


def test_whole_odd_clips_encode_and_decode(folder: Path) -> None:
    inputs = load_inputs(
        str(folder / "vae.safetensors"),
        original=None,
        family=None,
        device=torch.device("cpu"),
        progress=SilentProgress(),
    )
    recipe = DistillRecipe(data=(str(folder / "odd"),), num_clips=16, num_frames=5, crop_size=None, num_workers=0)
    data = training_data(recipe, inputs, SilentProgress())
    assert {Path(path).name for path in data.skipped} == {"noise.mp4", "empty.mp4"}
    assert {"1x4x5", "2x4x5", "2x6x4", "2x5x6", "2x1x2"} <= set(map(str, data.groups))
    for latents in data.first(16):
        assert inputs.original.require_decoder()(latents).isfinite().all()


def test_buckets_take_what_fits(folder: Path, tmp_path: Path) -> None:
    words = "--data odd --num-clips 30 --bucket 5x32x32 --bucket 1x24x24"
    data = distill(words, folder, tmp_path / "out.safetensors")
    assert set(data["num_clips_by_latent_size"]) == {"2x4x4", "1x3x3"}
    reasons = {Path(path).name: reason for path, reason in data["skipped"].items()}
    assert set(reasons) == {"noise.mp4", "empty.mp4", "tiny.mkv"}
    assert reasons["tiny.mkv"].endswith("every bucket (5x32x32, 1x24x24): 5x6x9")


def test_a_cache_and_workers_change_no_weight(folder: Path, tmp_path: Path) -> None:
    (folder / "list.txt").write_text("# two of them\nodd/long.mp4\nodd/tall.mp4\n")
    words = "--data list.txt --num-clips 8 --bucket 5x32x32"
    cached = f"{words} --num-workers 1 --cache-latents '{tmp_path / 'cache'}'"
    records = [
        distill(cached, folder, tmp_path / "a.safetensors"),
        distill(words, folder, tmp_path / "b.safetensors"),
    ]
    assert [record["num_workers"] for record in records] == [1, 0]
    assert records[0]["num_encoded"] == records[1]["num_encoded"] > 4
    weights, expected = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data odd/noise.mp4 --data odd/empty.mp4", "None of the 2 files can be used: "),
        ("--data odd --bucket 5x32", "--bucket"),
        ("--data odd --bucket 6x32x32", "give 5x32x32, say"),
        ("--data odd --bucket 65x32x32", "too short or too small for every bucket (65x32x32)"),
        ("--data good.mp4 --cache-latents odd", "is not a latent cache"),
    ],
)
def test_mistakes_in_data(folder: Path, tmp_path: Path, words: str, message: str) -> None:
    result = invoke(f"distill cut.safetensors {STEPS} -o '{tmp_path / 'out'}' {words}", cwd=folder)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())
