"""Validation of a distillation: how close the student comes to the original's output on clips it does not train on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.decoders.variants.exact import exact_decoder
from flashvaed_cli.metrics.quality import compare_frames, mean_quality
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.distill import DistillRecipe
from flashvaed_cli.recipe.settings import CalibratedRecipe
from flashvaed_cli.stages.common.clips import find_data, plan_calibration
from flashvaed_cli.stages.common.loading import Inputs

MAX_CLIPS = 8
MAX_SIDE = 512
"""Longest side of validation videos in pixels, unless the recipe sets one: the original decodes whole frames."""


@dataclass(frozen=True)
class Validation:
    """Judges the student as it is when called.

    Attributes:
        clips: raw latents, and the original's frames for them, on the CPU.
    """

    student: Decoder
    clips: tuple[tuple[Float[Tensor, "1 C T Hz Wz"], Float[Tensor, "1 3 F H W"]], ...]

    @torch.no_grad()
    def __call__(self) -> Mapping[str, float]:
        """Means over the clips: PSNR to the original's output in dB, and sharpness relative to it."""
        student = exact_decoder(self.student)
        quality = mean_quality([compare_frames(_frames(student, x), target) for x, target in self.clips])
        figures = {"validation_psnr_db": quality.psnr_db, "validation_sharpness": quality.sharpness_ratio}
        return {name: value for name, value in figures.items() if value is not None}


def validation_files(recipe: DistillRecipe) -> frozenset[Path]:
    """The files to validate on, resolved; training leaves them out."""
    return (
        frozenset(path.resolve() for path in find_data(recipe.validation_data))
        if recipe.validation_data
        else frozenset()
    )


@torch.no_grad()
def open_validation(
    recipe: DistillRecipe, inputs: Inputs, student: Decoder, teacher: Decoder, progress: Progress
) -> Validation | None:
    """Encode the validation clips, whole frames, and decode them with the original; None if the recipe names none.

    Raises:
        MediaError: nothing found, or nothing readable.
        ArtifactError: videos are given, and there is no encoder.
    """
    if not recipe.validation_data:
        return None
    cut = CalibratedRecipe(
        data=recipe.validation_data,
        num_frames=recipe.num_frames,
        crop_size=None,
        max_side=recipe.max_side or MAX_SIDE,
        latent_scale=recipe.latent_scale,
        seed=recipe.seed,
    )
    num_clips = min(MAX_CLIPS, len(validation_files(recipe)))
    planned = plan_calibration(inputs.original, cut, num_clips, inputs.device, progress, still=student.spec.still)
    exact = exact_decoder(teacher)
    clips = []
    with progress.task("validation clips", len(planned)) as task:
        for latents in planned:
            clips += [(one, _frames(exact, one)) for one in latents.split(1)]
            task.advance()
    return Validation(student, tuple(clips))


def _frames(decoder: Decoder, latents: Float[Tensor, "1 C T Hz Wz"]) -> Float[Tensor, "1 3 F H W"]:
    return decode(decoder, latents, chunk=1).float().clamp(-1.0, 1.0).cpu()
