"""The decoders that an evaluation compares, and their names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.recipe.evaluate import EvalRecipe
from flashvaed_cli.stages.common.loading import Inputs, load_inputs


def derived_decoders(inputs: Inputs, recipe: EvalRecipe, taken: Sequence[str] = ()) -> dict[str, Decoder]:
    """The input and everything in `compare`, by file name, except the original itself.

    Args:
        taken: names that are already in use.
    Raises:
        ArtifactError: a decoder to compare with cannot be loaded, or comes from another original.
    """
    derived = [inputs.checkpoint]
    for location in recipe.compare:
        other = load_inputs(
            location,
            original=recipe.original,
            family=inputs.checkpoint.family,
            device=inputs.device,
            progress=SilentProgress(),
            allow_download=recipe.allow_download,
        )
        if other.original.sha256 != inputs.original.sha256:
            raise ArtifactError(
                f"{location} comes from {other.original.location}, {inputs.checkpoint.location} from "
                f"{inputs.original.location}: only decoders of one original can be compared"
            )
        derived.append(other.checkpoint)
    derived = [one for one in derived if one.sha256 != inputs.original.sha256]
    names = distinct_names([Path(one.location) for one in derived], taken=taken)
    return {name: one.require_decoder() for name, one in zip(names, derived, strict=True)}


def distinct_names(files: Sequence[Path], taken: Sequence[str] = ()) -> list[str]:
    """File stems, numbered where one is already in use."""
    names: list[str] = []
    for path in files:
        name, number = path.stem, 1
        while name in (*taken, *names):
            number += 1
            name = f"{path.stem}-{number}"
        names.append(name)
    return names
