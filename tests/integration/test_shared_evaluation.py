"""Two processes of one launch judge the clips together, and find what one process finds."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.commands import CALIBRATION, read_report, succeed
from tests.toy import write_toy_clip, write_toy_vae

LIMIT_S = 300


class MeanColours(nn.Module):
    """Features of a window: the mean of each colour, and of its square."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean(dim=(2, 3, 4)), x.square().mean(dim=(2, 3, 4))], dim=1)


def test_two_processes_give_the_report_of_one(tmp_path: Path) -> None:
    write_toy_vae(tmp_path / "vae.safetensors")
    (tmp_path / "clips").mkdir()
    for index in range(3):
        write_toy_clip(tmp_path / "clips" / f"{index}.mp4", num_frames=5 + 4 * index)
    (tmp_path / "clips" / "broken.mp4").write_bytes(b"no video")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises newer formats
        torch.jit.script(MeanColours()).save(str(tmp_path / "features.pt"))
    succeed(f"prune vae.safetensors --ratio 0.5 --data clips/0.mp4 {CALIBRATION}", cwd=tmp_path)
    words = "eval pruned.safetensors --data clips --lpips off --vmaf off --no-video --num-speed-rounds 1"
    words += " --features features.pt --features-frames 2 --features-size 8 --device cpu --quiet"
    alone = succeed(words.replace(" --device cpu --quiet", "") + " -o alone", cwd=tmp_path)
    assert "0.mp4" in alone["stderr"] and "has seen" in alone["stderr"]  # it was calibrated on
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*launch, "-m", "flashvaed_cli", *words.split(), "-o", "shared"],
        cwd=tmp_path, env=environment, capture_output=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.count(b"wrote shared/report.json") == 1
    one, two = (read_report(tmp_path / name) for name in ("alone", "shared"))
    assert [clip["clip"] for clip in two["clips"]] == [clip["clip"] for clip in one["clips"]]
    for ours, theirs in zip(one["clips"], two["clips"], strict=True):
        assert ours == theirs
    for ours, theirs in zip(one["decoders"], two["decoders"], strict=True):
        for key in ("to_ground_truth", "to_original", "retention_percent"):
            assert ours[key] == theirs[key]
        if ours["frechet"] is not None:
            assert ours["frechet"]["num_samples"] == theirs["frechet"]["num_samples"] == 2 + 4 + 6
            # Sums in another order.
            assert abs((ours["frechet"]["to_ground_truth"] or 0) - (theirs["frechet"]["to_ground_truth"] or 0)) < 1e-9
    assert any("broken.mp4" in note for note in two["notes"]) and two["settings"]["processes"] == 2
    pictures = {path.name for path in (tmp_path / "shared").glob("*.png")}
    assert pictures == {path.name for path in (tmp_path / "alone").glob("*.png")} and len(pictures) == 3
