"""The closed-form fit as `prune` and `convert-ops` call it, and its table."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from flashvaed_cli.artifact.measured import LayerFigures
from flashvaed_cli.decoders.modules.coder import Coder, Decoder
from flashvaed_cli.decoders.spec.groups import Kept, compose_kept, tensor_widths
from flashvaed_cli.decoders.spec.light import has_same_blocks
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.settings import ReconstructingRecipe
from flashvaed_cli.report.tables import Column, TableData
from flashvaed_cli.stages.common.loading import Inputs
from flashvaed_cli.surgery.layer_fit import FitSettings, LayerError
from flashvaed_cli.surgery.reconstruct import first_changed_block, reconstruct_coder


def fit_settings(recipe: ReconstructingRecipe, *, num_separable_iterations: int = 3) -> FitSettings:
    """The recipe's settings of the solves."""
    return FitSettings(
        mode="channel" if recipe.reconstruct == "channel" else "full",
        dampening_frac=recipe.dampening_frac,
        num_separable_iterations=num_separable_iterations,
        seed=recipe.seed,
    )


def choose_reference(inputs: Inputs, kept: Kept, progress: Progress) -> tuple[Decoder, Kept]:
    """The decoder to solve against, and its kept channels: the original where possible.

    A decoder pruned elsewhere does not record which channels it kept, and a light one has kept none: such a decoder is
    its own reference.

    Args:
        kept: channels of the input decoder that this step keeps.
    """
    decoder, original = inputs.checkpoint.require_decoder(), inputs.reference()
    if not has_same_blocks(decoder.spec, original.spec):
        return decoder, kept
    before = inputs.checkpoint.kept_channels
    widths = tensor_widths(original.spec) | {tensor: len(channels) for tensor, channels in before.items()}
    if tensor_widths(decoder.spec) == widths:
        return original, compose_kept(before, kept)
    progress.warn(
        f"{inputs.checkpoint.location} is narrower than its original and does not say which channels were kept: "
        "its own output is reconstructed, not the original's"
    )
    return decoder, kept


_MUCH_MISSED = 0.5
"""Share of a target's variance; a layer that misses more is reported as poorly fitted."""


def reconstruct(
    before: Coder,
    after: Coder,
    reference: Coder,
    kept: Kept,
    clips: Iterable[Tensor],
    settings: FitSettings,
    progress: Progress,
) -> list[LayerError]:
    """Solve `after` in place, from the first block in which it differs from `before` to the end."""
    first = first_changed_block(before, after)
    if first is None:
        return []
    errors = reconstruct_coder(reference, after, kept, clips, first_block=first, settings=settings, progress=progress)
    starved = [error.address for error in errors if error.num_rows < 2 * error.num_unknowns]
    more_data = "Give more or larger clips (--num-calibration-clips, --num-frames, --crop-size)"
    if starved:
        progress.warn(
            f"too few calibration positions to determine all weights of {', '.join(starved)}; the rest keep their "
            f"old values. {more_data}"
        )
    if missed := [error for error in errors if error.after > _MUCH_MISSED]:
        listed = ", ".join(f"{error.address} ({100 * error.after:.0f} %)" for error in missed)
        progress.warn(
            f"least squares misses much of these layers' targets, even on the calibration clips: {listed}. "
            f"{more_data}, keep more channels, or compare with --reconstruct none"
        )
    unsolved = [error.address for error in errors if error.num_unknowns == 0]
    if unsolved:
        progress.warn(f"too large to solve, left unchanged: {', '.join(unsolved)}")
    return errors


def layer_figures(errors: Iterable[LayerError]) -> tuple[LayerFigures, ...]:
    """The errors of all layers, for the artifact."""
    return tuple(LayerFigures(**vars(error)) for error in errors)


def error_table(errors: list[LayerError]) -> tuple[TableData, ...]:
    """One row per solved layer; no table when nothing was solved."""
    if not errors:
        return ()
    columns = (
        Column("layer", align="left"),
        Column("error before", ".4f"),
        Column("after", ".4f"),
        Column("positions", ",d"),
        Column("unknowns", ",d"),
    )
    rows = tuple((e.address, e.before, e.after, e.num_rows, e.num_unknowns) for e in errors)
    return (TableData("Reconstruction: share of the target's variance that is missed", columns, rows),)
