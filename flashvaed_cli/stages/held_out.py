"""How good a decoder is at the end of `prune` and `convert-ops`: on clips that no weight was fitted to, if possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashvaed_cli.artifact.checkpoint import Checkpoint
from flashvaed_cli.decoders.coder import Decoder
from flashvaed_cli.decoders.cost import total_gflop
from flashvaed_cli.decoders.exact import exact_decoder
from flashvaed_cli.decoders.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.errors import FlashVaedError
from flashvaed_cli.media.latent_files import is_latent_file
from flashvaed_cli.metrics.quality import QualityResult, compare_frames, mean_quality
from flashvaed_cli.metrics.speed import SpeedRatio, speed_ratio, synchronizer, time_alternating
from flashvaed_cli.progress import Progress, SilentProgress
from flashvaed_cli.recipe.settings import CalibratedRecipe
from flashvaed_cli.report.tables import Cell, Column, TableData
from flashvaed_cli.stages.clips import CalibrationClips, find_data, plan_calibration
from flashvaed_cli.surgery.layer_fit import LayerError

NUM_CLIPS = 2
_NUM_ROUNDS = 3
_BUDGET_S = 8.0
_NUM_WORST = 3


@torch.no_grad()
def judge_held_out(
    original: Decoder,
    student: Decoder,
    vae: Checkpoint,
    fitted: CalibrationClips | None,
    recipe: CalibratedRecipe,
    device: torch.device,
    progress: Progress,
) -> tuple[dict[str, Any], SpeedRatio]:
    """PSNR and sharpness to the original's output, and the speed-up over it, eager.

    Args:
        original: of the decoder that is judged, without time for one of single images.
        vae: the original with its encoder.
        fitted: the clips of the fit; None where nothing was fitted.
    Returns:
        `clips` (names), `which` (how they relate to those of the fit), `psnr_db`, `sharpness_ratio`, GFLOP of the first
        clip before and after; and how many times faster the student was.
    """
    clips, which = _held_out_clips(vae, fitted, recipe, device, student.spec.still)
    eager = DecodeRuntime(original, DecodeSettings(memory_format="contiguous"))
    tuned = DecodeRuntime(exact_decoder(student), DecodeSettings())
    quality: list[QualityResult] = []
    first: Tensor | None = None
    for latents in clips:
        first = latents if first is None else first
        quality.append(compare_frames(tuned.decode(latents), eager.decode(latents)))
    assert first is not None
    calls = {"original": partial(eager.decode, first), "student": partial(tuned.decode, first)}
    speeds = time_alternating(
        calls, num_rounds=_NUM_ROUNDS, budget_s=_BUDGET_S, synchronize=synchronizer(device), progress=progress
    )
    ratio = speed_ratio(speeds["original"], speeds["student"])
    mean = mean_quality(quality)
    grid = (first.shape[2], first.shape[3], first.shape[4])
    record = {
        "clips": [path.name for path in clips.files],
        "which": which,
        "num_clips": len(quality),
        "psnr_db": mean.psnr_db,
        "sharpness_ratio": mean.sharpness_ratio,
        "gflop_before": total_gflop(original.spec, grid),
        "gflop_after": total_gflop(student.spec, grid),
    }
    return record, ratio


def summary_tables(
    record: Mapping[str, Any], speed: SpeedRatio, parameters: tuple[int, int], errors: Sequence[LayerError]
) -> tuple[TableData, ...]:
    """What matters: quality, speed and size in one column, and the layers that least squares could reproduce least."""
    rows: list[tuple[Cell, ...]] = [
        (f"PSNR to the original, dB, {record['which']}", f"{min(record['psnr_db'], 100):.2f}"),
        ("times faster than the eager original", _speedup(speed)),
        ("million parameters", f"{parameters[0] / 1e6:.3f} to {parameters[1] / 1e6:.3f}"),
        ("GFLOP for such a clip", f"{record['gflop_before']:.1f} to {record['gflop_after']:.1f}"),
    ]
    if record["sharpness_ratio"] is not None:
        rows.insert(1, ("sharpness, the original's is 1", f"{record['sharpness_ratio']:.3f}"))
    worst = sorted(errors, key=lambda one: one.after, reverse=True)[:_NUM_WORST]
    rows += [(f"layer {error.address} misses of its target", f"{100 * error.after:.2g} %") for error in worst]
    return (TableData("", (Column("", align="left"), Column("")), tuple(rows)),)


def _speedup(speed: SpeedRatio) -> str:
    if len(speed.ratios) == 1:
        return f"{speed.median:.2f} (1 round)"
    return f"{speed.median:.2f} ({speed.min:.1f}–{speed.max:.1f} in {len(speed.ratios)} rounds)"


def _held_out_clips(
    vae: Checkpoint, fitted: CalibrationClips | None, recipe: CalibratedRecipe, device: torch.device, still: bool
) -> tuple[CalibrationClips, str]:
    """Other files if the data has more; else other windows of the same videos; else the clips of the fit."""
    used = set() if fitted is None else set(fitted.files)
    others = [path for path in find_data(recipe.data) if path not in used]
    if others:
        places, which = others, f"on {min(NUM_CLIPS, len(others))} other clips"
    else:
        places = [path for path in used if not is_latent_file(path)]
        which = "on other windows of the same clips"
    if places:
        settings = {"data": tuple(map(str, places)), "seed": recipe.seed + 1}
        try:
            plan = plan_calibration(
                vae, recipe.model_copy(update=settings), NUM_CLIPS, device, SilentProgress(), still=still
            )
            return plan, which
        except FlashVaedError:
            pass  # broken ones
    assert fitted is not None
    return fitted, "on the clips of the fit"
