"""Round the clip sizes of a recipe down to sizes that a VAE takes, with a warning."""

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
    """The VAE's compression factors, and the longest clip that its decoder takes at once."""
    spec = vae.require_decoder().spec
    tiles = spec.temporal_tiles
    return LatentGrid(spec.temporal_factor, spec.spatial_factor, None if tiles is None else tiles.length)


def fitted_to_vae(
    recipe: RecipeT, vae: Checkpoint, progress: Progress, *, still: bool = False, unused: Collection[str] = ()
) -> RecipeT:
    """The recipe with its frames and sides rounded down to what the VAE takes; one warning names what is rounded.

    Args:
        still: single frames, for a decoder of single images; warned of only if another number was given.
        unused: fields that have no effect and are left unchanged.
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
            reasons.append("single frames" if still else frames_taken(grid))
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


def frames_taken(grid: LatentGrid) -> str:
    """The numbers of frames that a VAE takes, in words."""
    frames = "any number of frames" if grid.temporal_factor == 1 else f"1 + {grid.temporal_factor} n frames"
    return (
        frames
        if grid.clip_length is None
        else f"{frames}, {1 + grid.temporal_factor * (grid.clip_length - 1)} at most as one clip"
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
