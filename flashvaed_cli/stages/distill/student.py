"""`distill --student`: a new light decoder in place of the given one, and its first weights."""

from __future__ import annotations

from dataclasses import replace

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.predict.cost import total_gflop
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.latent_patches import per_channel
from flashvaed_cli.decoders.spec.light import light_spec
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.distill import DistillRecipe
from flashvaed_cli.stages.common.loading import Inputs
from flashvaed_cli.stages.distill.data import TrainingData
from flashvaed_cli.surgery.layer_fit import FitSettings
from flashvaed_cli.surgery.light.start import fit_last_layer, random_light_decoder

NUM_START_CLIPS = 8
"""Training clips that the last layer is fitted to."""
_SIZE_SHOWN = (9, 256, 256)


def with_new_student(recipe: DistillRecipe, inputs: Inputs, progress: Progress) -> Inputs:
    """The inputs with a light decoder, with random weights, in place of the decoder to train, if the recipe asks.

    The latents are those of the input's original, which teaches. The weights are the same for the same seed.

    Raises:
        SpecError: no such decoder for this original, or the width does not suit.
    """
    if recipe.student is None:
        return inputs
    if recipe.keep_ratio is not None or recipe.stage_keep_ratios or recipe.group_keep_ratios:
        progress.warn("--ratio: ignored with --student; --student-width sets its width")
    teacher, parent = inputs.reference(), inputs.checkpoint
    if not parent.latent_mean:
        progress.warn(
            f"{parent.location}: the statistics of its latents are unknown, so the {recipe.student} reads them raw"
        )
    mean, std = per_channel(parent.latent_mean, parent.latent_std, parent.latent_width)
    statistics = {"mean": mean, "std": std}
    spec = light_spec(recipe.student, teacher.spec, recipe.student_width, **statistics)
    student = random_light_decoder(spec, **statistics, seed=recipe.seed).to(inputs.device)
    progress.log(
        f"student: a new {recipe.student} for the latents of {inputs.original.location}: "
        f"{student.parameter_count / 1e6:.3g} million parameters, {_gflop(spec):.3g} GFLOP for 9 frames of 256x256, "
        f"where the original has {teacher.parameter_count / 1e6:.3g} million and {_gflop(teacher.spec):.3g} GFLOP"
    )
    return replace(inputs, checkpoint=replace(parent, decoder=student, encoder=None, kept_channels={}, twins=()))


def give_first_weights(
    recipe: DistillRecipe, student: Decoder, teacher: Decoder, data: TrainingData, progress: Progress
) -> dict[str, float] | None:
    """Fit the last layer of a new student to the original's frames, unless the recipe asks for a random start.

    Returns:
        The share of the frames' variance that it misses before and after; None if nothing was fitted.
    Raises:
        CalibrationError: the clips give too few positions for the unknowns.
    """
    if recipe.student is None or recipe.start_of_student() == "random":
        return None
    clips = data.first(NUM_START_CLIPS)
    error = fit_last_layer(
        student, teacher, clips, num_clips=len(clips), settings=FitSettings(seed=recipe.seed, dampening_frac=1e-4)
    )
    progress.log(
        f"start: the last layer solved on {len(clips)} clips; it misses {100 * error.after:.3g} % of the variance of "
        f"the original's frames (random: {100 * error.before:.3g} %)"
    )
    return {"missed_before": error.before, "missed_after": error.after}


def _gflop(spec: DecoderSpec) -> float:
    frames, height, width = _SIZE_SHOWN
    factor = spec.spatial_factor
    return total_gflop(spec, (1 if spec.still else spec.num_latents(frames), height // factor, width // factor))
