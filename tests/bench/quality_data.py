"""Latents to calibrate on and others to judge on, for the quality tables.

`FLASHVAED_BENCH_DATA` names a folder of videos (by default `../shared/data/clips`, where it exists) and
`FLASHVAED_BENCH_HELD_OUT` the stems of those to judge on. Without a folder both come from the shipped clip.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flashvaed_cli.artifact.checkpoint import Checkpoint
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.media.sources import find_clips
from flashvaed_cli.metrics.quality import psnr_db
from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.recipe.fields import BUILTIN_VAE
from flashvaed_cli.recipe.prune import PruneRecipe
from flashvaed_cli.stages.common.clips import plan_calibration
from flashvaed_cli.stages.common.loading import load_inputs

HELD_OUT = os.environ.get("FLASHVAED_BENCH_HELD_OUT", "sam2_coffee gen_ltx2_dialogue tos_lab_dark bbb_bird").split()
NUM_CALIBRATION, NUM_JUDGED = 12, 8


@dataclass(frozen=True)
class QualityData:
    """The embedded VAE, raw latents to solve on and to judge on, and what the original makes of the latter."""

    vae: Checkpoint
    calibration: tuple[Tensor, ...]
    judged: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    source: str

    @torch.no_grad()
    def psnr(self, decoder: Decoder) -> float:
        """Mean PSNR in dB to the original's frames over the judged clips."""
        values = [
            psnr_db(decoder(x).clamp(-1.0, 1.0), target) for x, target in zip(self.judged, self.targets, strict=True)
        ]
        return sum(values) / len(values)


def split_videos() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The videos to solve or train on, and those to judge on; none without a folder."""
    folder = Path(os.environ.get("FLASHVAED_BENCH_DATA", Path(__file__).parents[3] / "shared/data/clips"))
    files = find_clips([str(folder)]) if folder.is_dir() else []
    training = tuple(str(path) for path in files if path.stem not in HELD_OUT)
    return training, tuple(str(path) for path in files if path.stem in HELD_OUT)


@torch.no_grad()
def load_quality_data() -> QualityData:
    """9 frames of 128 x 128 from each clip, 12 clips to solve on and 8 to judge on."""
    device = torch.device("cpu")
    vae = load_inputs(BUILTIN_VAE, original=None, family=None, device=device, progress=SilentProgress()).checkpoint
    training, judging = split_videos()

    def latents(paths: tuple[str, ...], num_clips: int, seed: int) -> tuple[Tensor, ...]:
        recipe = PruneRecipe(data=paths, num_frames=9, crop_size=128, max_side=512, seed=seed)
        return tuple(plan_calibration(vae, recipe, num_clips, device, SilentProgress()))

    decoder = vae.require_decoder()
    judged = latents(judging, NUM_JUDGED, 1)
    source = f"{len(training)} clips, judged on {len(judging)} others" if judging else "the shipped clip"
    targets = tuple(decoder(x).clamp(-1.0, 1.0) for x in judged)
    return QualityData(vae, latents(training, NUM_CALIBRATION, 0), judged, targets, source)
