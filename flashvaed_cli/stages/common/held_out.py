"""Judge the decoder at the end of `prune` and `convert-ops`, if possible on clips that no weight was fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flashvaed_cli.artifact.checkpoint import Checkpoint
from flashvaed_cli.artifact.measured import HeldOutFigures
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.predict.cost import total_gflop
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.variants.exact import exact_decoder
from flashvaed_cli.errors import ArtifactError, FlashVaedError, MediaError, NonFiniteError
from flashvaed_cli.media.latent_files import is_latent_file
from flashvaed_cli.metrics.quality import QualityResult, compare_frames, mean_quality
from flashvaed_cli.metrics.speed import SpeedRatio, speed_ratio, synchronizer, time_alternating
from flashvaed_cli.progress import Progress, SilentProgress
from flashvaed_cli.recipe.settings import CalibratedRecipe
from flashvaed_cli.report.tables import Cell, Column, TableData
from flashvaed_cli.stages.common.clips import CalibrationClips, find_data, plan_calibration
from flashvaed_cli.surgery.layer_fit import LayerError

NUM_CLIPS = 2
_NUM_ROUNDS = 3
_BUDGET_S = 8.0
_NUM_WORST = 3


@dataclass(frozen=True)
class HeldOut:
    """Quality and speed of a decoder; None where they could not be measured.

    Attributes:
        figures: their GFLOP are those of the last clip.
        speed: as a multiple of the eager original's.
    """

    figures: HeldOutFigures | None = None
    speed: SpeedRatio | None = None

    @property
    def speedup(self) -> float | None:
        """The median."""
        return None if self.speed is None else self.speed.median


@torch.no_grad()
def judge_held_out(
    original: Decoder,
    student: Decoder,
    vae: Checkpoint,
    fitted: CalibrationClips | None,
    recipe: CalibratedRecipe,
    device: torch.device,
    progress: Progress,
) -> HeldOut:
    """PSNR and sharpness to the original's output, and the speed-up over it, eager.

    Args:
        original: of the decoder that is judged; for one of single images, its still variant.
        vae: the original with its encoder.
        fitted: the clips of the fit; None if nothing was fitted.
    Returns:
        An empty result, with a warning, if there is no clip to judge on or frames are not finite: the command's output
        is kept in any case.
    """
    try:
        return _judged(original, student, vae, fitted, recipe, device, progress)
    except (ArtifactError, MediaError, NonFiniteError) as error:
        progress.warn(f"the result is not judged: {error}")
        return HeldOut()


def _judged(
    original: Decoder,
    student: Decoder,
    vae: Checkpoint,
    fitted: CalibrationClips | None,
    recipe: CalibratedRecipe,
    device: torch.device,
    progress: Progress,
) -> HeldOut:
    clips, which = _held_out_clips(vae, fitted, recipe, device, student.spec.still)
    exact, tuned = (DecodeRuntime(exact_decoder(one), DecodeSettings()) for one in (original, student))
    quality: list[QualityResult] = []
    last: Tensor | None = None
    for latents in clips:
        if last is not None:
            quality.append(compare_frames(tuned.decode(last), exact.decode(last)))
        last = latents
    assert last is not None
    del exact  # a copy of the weights
    eager = DecodeRuntime(original, DecodeSettings(memory_format="contiguous"))
    frames = tuned.decode(last)
    wanted: list[Tensor] = []  # the eager original is slow at full size: a timed run gives the last clip's frames too

    def decode_eagerly() -> None:
        wanted[:] = [eager.decode(last)]

    speeds = time_alternating(
        {"original": decode_eagerly, "student": partial(tuned.decode, last)},
        num_warmup=0,
        num_rounds=_NUM_ROUNDS,
        budget_s=_BUDGET_S,
        synchronize=synchronizer(device),
        progress=progress,
    )
    quality.append(compare_frames(frames, wanted[0]))
    ratio = speed_ratio(speeds["original"], speeds["student"])
    mean = mean_quality(quality)
    grid = (last.shape[2], last.shape[3], last.shape[4])
    figures = HeldOutFigures(
        clips=tuple(path.name for path in clips.files),
        which=which,
        num_clips=len(quality),
        psnr_db=mean.psnr_db,
        sharpness_ratio=mean.sharpness_ratio,
        gflop_before=total_gflop(original.spec, grid),
        gflop_after=total_gflop(student.spec, grid),
    )
    return HeldOut(figures, ratio)


def summary_tables(judged: HeldOut, parameters: tuple[int, int], errors: Sequence[LayerError]) -> tuple[TableData, ...]:
    """Quality, speed and size in one column, and the layers that least squares reproduced worst."""
    rows: list[tuple[Cell, ...]] = []
    if (record := judged.figures) is not None:
        rows.append((f"PSNR to the original, dB, {record.which}", f"{min(record.psnr_db, 100):.2f}"))
        if record.sharpness_ratio is not None:
            rows.append(("sharpness, the original's is 1", f"{record.sharpness_ratio:.3f}"))
        rows.append(("GFLOP for such a clip", f"{record.gflop_before:.1f} to {record.gflop_after:.1f}"))
    if judged.speed is not None:
        rows.append(("speed, the eager original's is 1", _speedup(judged.speed)))
    rows.append(("million parameters", f"{parameters[0] / 1e6:.3f} to {parameters[1] / 1e6:.3f}"))
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
    """Other files if the data has any; else other windows of the same videos; else the clips of the fit."""
    used = set() if fitted is None else set(fitted.files)
    others = [path for path in find_data(recipe.data) if path not in used]
    if others:
        places, which = (
            others,
            "on another clip" if len(others) == 1 else f"on {min(NUM_CLIPS, len(others))} other clips",
        )
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
        except FlashVaedError:  # broken ones, or no encoder
            if fitted is None:
                raise
    if fitted is None:
        raise MediaError("there is no clip to judge on; give --data")
    return fitted, "on the clips of the fit"
