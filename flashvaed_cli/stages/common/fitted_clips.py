"""The sizes of clip that a VAE takes, in place of those that a recipe asks for. What is rounded is said."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

from flashvaed_cli.artifact.checkpoint import Checkpoint
from flashvaed_cli.errors import MediaError
from flashvaed_cli.media.cuts import LatentGrid
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.distill import DistillRecipe
from flashvaed_cli.recipe.settings import CalibratedRecipe

RecipeT = TypeVar("RecipeT", CalibratedRecipe, DistillRecipe)

_SIDES = ("crop_size", "max_side")


def latent_grid(vae: Checkpoint) -> LatentGrid:
    """What the VAE compresses by."""
    spec = vae.require_decoder().spec
    return LatentGrid(spec.temporal_factor, spec.spatial_factor)


def fitted_to_vae(
    recipe: RecipeT, vae: Checkpoint, progress: Progress, *, still: bool = False, unused: Collection[str] = ()
) -> RecipeT:
    """The recipe with its frames and sides rounded down to what the VAE takes; one warning names what is rounded.

    Args:
        still: single frames, for a decoder of single images; said only where another number was given.
        unused: fields that have no effect, and are left as they are.
    Raises:
        MediaError: a side holds no latent.
    """
    grid = latent_grid(vae)
    wanted = {name: getattr(recipe, name) for name in ("num_frames", *_SIDES) if name not in unused}
    fitted: dict[str, int] = {}
    for name, value in wanted.items():
        if name == "num_frames":
            fitted[name] = 1 if still else grid.whole_frames(value)
        elif value is not None:
            fitted[name] = whole_side(name, value, grid)
    changed = {name: value for name, value in fitted.items() if value != wanted[name]}
    said = [name for name in changed if name != "num_frames" or not still or recipe.given(name)]
    if said:
        reasons = []
        if "num_frames" in said:
            reasons.append("single frames" if still else f"1 + {grid.temporal_factor} n frames")
        if set(_SIDES) & set(said):
            reasons.append(f"sides that {grid.spatial_factor} divides")
        taken = " and ".join(f"{_flag(name)} {wanted[name]} is taken as {changed[name]}" for name in said)
        progress.warn(f"{taken}: this decoder takes {' and '.join(reasons)}")
    return recipe.model_copy(update=changed)


def whole_side(name: str, side: int, grid: LatentGrid) -> int:
    """A side in pixels, rounded down to whole latents.

    Raises:
        MediaError: it holds none.
    """
    if side < grid.spatial_factor:
        raise MediaError(
            f"{_flag(name)} {side} leaves nothing: a latent covers {grid.spatial_factor} × {grid.spatial_factor} "
            f"pixels. Give {grid.spatial_factor} or more, or 0 for no limit."
        )
    return side // grid.spatial_factor * grid.spatial_factor


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
